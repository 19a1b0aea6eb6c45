//! The end of a container's init process. Its work is done: it only has to exist, so that the namespaces do, and to let
//! the kernel bury orphans (SIGCHLD is ignored, so they need no wait). It therefore gives back all of its memory, the
//! agent's binary and heap included, but one page with these few instructions. There is nothing left in it to attack,
//! to read or to pay for.

use std::arch::global_asm;
use std::os::fd::OwnedFd;

use crate::sys;

// The code is copied to a page of its own and jumped to with that page's address. It unmaps everything below and
// above, then sleeps for ever. It uses no stack.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".globl pykata_idle_begin, pykata_idle_end",
    "pykata_idle_begin:",
    "mov r12, rdi", // the page
    "mov rsi, r12", // munmap(0, page)
    "xor edi, edi",
    "mov eax, 11",
    "syscall",
    "lea rdi, [r12 + 4096]", // munmap(page + 4096, the rest up to TASK_SIZE)
    "mov rsi, 0x7ffffffff000",
    "sub rsi, rdi",
    "mov eax, 11",
    "syscall",
    "2:",
    "mov eax, 34", // pause()
    "syscall",
    "jmp 2b",
    "pykata_idle_end:",
);

#[cfg(target_arch = "aarch64")]
global_asm!(
    ".globl pykata_idle_begin, pykata_idle_end",
    "pykata_idle_begin:",
    "mov x19, x0", // the page
    "mov x0, xzr", // munmap(0, page)
    "mov x1, x19",
    "mov x8, 215",
    "svc 0",
    "add x20, x19, 4096", // munmap(page + 4096, the rest): refused beyond TASK_SIZE, which is 2^48 or 2^39
    "mov x0, x20",
    "mov x1, 0x1000000000000",
    "sub x1, x1, x0",
    "svc 0",
    "mov x0, x20",
    "mov x1, 0x8000000000",
    "sub x1, x1, x0",
    "svc 0",
    "2:",
    "mov x0, xzr", // ppoll(NULL, 0, NULL, NULL, 0)
    "mov x1, xzr",
    "mov x2, xzr",
    "mov x3, xzr",
    "mov x4, xzr",
    "mov x8, 73",
    "svc 0",
    "b 2b",
    "pykata_idle_end:",
);

unsafe extern "C" {
    static pykata_idle_begin: u8;
    static pykata_idle_end: u8;
}

// The C library's record of where it had the kernel put this thread's restartable sequences, from the thread pointer.
unsafe extern "C" {
    static __rseq_offset: isize;
}

/// Where the thread pointer points.
fn thread_pointer() -> usize {
    let pointer: usize;
    // SAFETY: reads one register (x86 keeps a copy of it where it points).
    unsafe {
        #[cfg(target_arch = "x86_64")]
        std::arch::asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly, preserves_flags));
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!("mrs {}, tpidr_el0", out(reg) pointer, options(nostack, nomem, preserves_flags));
    }
    pointer
}

/// Has the kernel forget the C library's restartable sequences: after each preemption it would write to their memory,
/// and kill who has none there.
fn unregister_rseq() -> bool {
    const UNREGISTER: u32 = 1;
    // The C library's signature for aborts on each architecture.
    const SIGNATURE: u32 = if cfg!(target_arch = "x86_64") { 0x5305_3053 } else { 0xd428_bc00 };
    // SAFETY: a constant that the C library sets before `main`.
    let area = thread_pointer().wrapping_add_signed(unsafe { __rseq_offset });
    // The length must be that of the registration, which later C libraries take from the kernel.
    (1..=8).any(|units| {
        // SAFETY: only ends a registration; nothing in this process has critical sequences.
        unsafe { libc::syscall(libc::SYS_rseq, area, units * 32u32, UNREGISTER, SIGNATURE) == 0 }
    })
}

/// Turns this process into an idle init. Its descriptors are closed, but for those that it keeps for whoever asks what was
/// changed in the container: its layers, in this order. Nobody in there can get at them who has less than all capabilities.
pub fn forever(kept: &[OwnedFd]) -> ! {
    // SAFETY: nothing of this process uses a descriptor from here on, as nothing but the lines below is ever run.
    unsafe { sys::close_all_but(0, kept) };
    sys::ignore_signal(libc::SIGCHLD);
    let _ = rustix::thread::set_name(c"init");
    if !unregister_rseq() {
        loop {
            // SAFETY: takes no arguments. Memory that can't be given back safely is kept.
            unsafe { libc::pause() };
        }
    }
    // SAFETY: the symbols bound the code above, which lies in our text. The new page is written before it is made
    // executable; the code there depends on no memory but itself, and takes its own address as its only argument.
    unsafe {
        let begin = &raw const pykata_idle_begin;
        let len = (&raw const pykata_idle_end).addr() - begin.addr();
        let page = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if page == libc::MAP_FAILED {
            sys::exit_now(1);
        }
        std::ptr::copy_nonoverlapping(begin, page.cast(), len);
        if libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC) != 0 {
            sys::exit_now(1);
        }
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!("dc cvau, {0}", "dsb ish", "ic ivau, {0}", "dsb ish", "isb", in(reg) page);
        let idle: extern "C" fn(*mut libc::c_void) -> ! = std::mem::transmute(page);
        idle(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::Cloned;

    #[test]
    fn only_one_page_is_left() {
        // SAFETY: the child only calls `forever`, which allocates nothing and takes no lock.
        let pid = match unsafe { sys::clone_into(0, None) }.expect("clone") {
            Cloned::Child => forever(&[]),
            Cloned::Parent { pid } => pid,
        };
        let maps = format!("/proc/{pid}/maps");
        let only_page =
            || std::fs::read_to_string(&maps).expect("maps").lines().filter(|l| !l.contains("vsyscall")).count();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(300);
        while only_page() != 1 && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert_eq!(only_page(), 1);
        sys::kill(pid, libc::SIGKILL).expect("kill");
        let pid = rustix::process::Pid::from_raw(pid);
        let (_, status) =
            rustix::process::waitpid(pid, rustix::process::WaitOptions::empty()).expect("wait").expect("ended");
        assert_eq!(status.terminating_signal(), Some(libc::SIGKILL));
    }
}
