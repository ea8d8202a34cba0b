"""`sps2 bench kernels`: each kernel against its roofline and against torch's best."""
