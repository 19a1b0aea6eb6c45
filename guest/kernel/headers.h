/* What more than a third of the kernel's files include, by way of these: see ./cc. */
#include <linux/kconfig.h>
#include <linux/compiler_types.h>
#include <linux/kernel.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/security.h>
#include <linux/bpf.h>
#include <linux/seq_file.h>
#include <linux/memcontrol.h>
#include <linux/syscalls.h>
#include <linux/interrupt.h>
#include <linux/device.h>
