"""What runs inside a container, beside the kernel: standard library and IPython only, Python 3.8 and later."""
