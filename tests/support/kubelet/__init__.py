"""A small Kubernetes on processes, for rendered releases: one node, as much of its kubelet and controllers as they use.

What is a network, a file system or a process table of its own in a cluster is one here too: namespaces of the kernel,
which need no rights (`namespaces`). So every container has exactly the environment, arguments, ports, volumes and user
that its manifest and its image give. What is absent: images as such (the checkout and its virtual environment stand in
for what they would hold), limits of CPU and memory, NetworkPolicies, and everything with more than one node.
"""
