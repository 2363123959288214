/* bcc's helpers compare these; an XDP program does not depend on the running kernel's version. */
#define LINUX_VERSION_CODE 0x050f00
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
