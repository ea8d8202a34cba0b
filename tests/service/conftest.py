"""Settings that must stand before the first gRPC channel of the test process is made."""

import os

# The tests start children while gRPC runs in this process too. Its fork handlers would then run between fork
# and exec, and some children die there; an exec'ed child needs none of them.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
