"""The kernel's interface: system calls, namespaces, mounts, seccomp, cgroups. Standard library only."""
