/* bcc takes a directory for kernel sources only if this file is in it. */
#define CONFIG_BPF_SYSCALL 1
#define CONFIG_64BIT 1
