//! The system calls that rustix has no safe form for.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use std::sync::atomic::{AtomicI32, Ordering};

use rustix::io::Errno;
use rustix::time::Timespec;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::errno;

/// `<linux/sched.h>`; libc's own constant is cut off.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of a clone one is on.
pub enum Cloned {
    Parent { pid: i32 },
    Child,
}

/// `clone3` in the way of `fork`: the child has a copy of the memory and runs on from here. `flags` are `CLONE_*`;
/// the child starts in the cgroup `cgroup`.
///
/// # Safety
/// The process must have one thread (a lock held by another would stay locked in the child for ever), and the child
/// must end in `_exit` or `exec`, never return into the event loop.
pub unsafe fn clone_into(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    // SAFETY: clone_args is a plain record of integers; zero means "not used" in each field.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    // A sibling's is the parent's own.
    args.exit_signal = if flags & libc::CLONE_PARENT as u64 == 0 { libc::SIGCHLD as u64 } else { 0 };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the kernel reads `args` only during the call. Without CLONE_VM and with no stack the child goes on with
    // a copy of ours, as after fork; the caller vouches for the rest.
    let ret = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match ret {
        -1 => Err(errno::last()),
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent { pid: pid as i32 }),
    }
}

/// For a child that shares its parent's memory until it executes something: the memory for its calls.
pub struct Stack {
    memory: Vec<u128>,
    /// Not 0 while a child uses it: the kernel clears it.
    used: Box<AtomicI32>,
}

impl Stack {
    pub fn new(size: usize) -> Self {
        Self { memory: Vec::with_capacity(size / size_of::<u128>()), used: Box::default() }
    }

    /// A child has neither executed something nor ended yet.
    pub fn is_used(&self) -> bool {
        self.used.load(Ordering::SeqCst) != 0
    }

    /// A child that runs `life`. `flags` are further `CLONE_*`. Its PID, as this process sees it, is in `pid` before it runs.
    ///
    /// # Safety
    /// Both processes must have one thread. `life` must not return, and neither give back nor move memory of its parent's.
    /// While the stack is used this process must neither give back, move nor change what the child works with, nor use the
    /// allocator or the C library; with `CLONE_VFORK` it isn't used any more when this returns.
    pub unsafe fn clone<T>(
        &mut self,
        flags: i32,
        life: extern "C" fn(&mut T) -> !,
        with: &mut T,
        pid: *mut i32,
    ) -> Result<(), Errno> {
        // SAFETY: the two types differ in how they say that a pointer is good and that nothing comes back.
        let life = unsafe {
            std::mem::transmute::<extern "C" fn(&mut T) -> !, extern "C" fn(*mut libc::c_void) -> libc::c_int>(life)
        };
        let top = self.memory.spare_capacity_mut().as_mut_ptr_range().end.cast();
        let own = libc::CLONE_VM | libc::CLONE_PARENT_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD;
        let (with, used, tls) = ((&raw mut *with).cast(), self.used.as_ptr(), std::ptr::null_mut::<libc::c_void>());
        self.used.store(1, Ordering::SeqCst);
        // SAFETY: the stack is the child's alone, as the caller promises. The kernel checks where it writes the PID to.
        match unsafe { libc::clone(life, top, flags | own, with, pid, tls, used) } {
            -1 => {
                self.used.store(0, Ordering::SeqCst);
                Err(errno::last())
            }
            _ => Ok(()),
        }
    }
}

/// Has the event loop watch a descriptor, which it then owns.
pub fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, Errno> {
    // SAFETY: an OwnedFd is one open descriptor, always the same, until it is dropped.
    unsafe { AsyncFd::register_with_interest(fd, interest) }
        .map_err(|err| Errno::from_io_error(&err.into_parts().1).unwrap_or(Errno::IO))
}

/// `setns` with a pidfd (several `CLONE_NEW*` at once) or a namespace fd.
pub fn setns(fd: BorrowedFd<'_>, flags: i32) -> Result<(), Errno> {
    // SAFETY: takes integers only.
    match unsafe { libc::setns(fd.as_raw_fd(), flags) } {
        0 => Ok(()),
        _ => Err(errno::last()),
    }
}

/// Ends the process at once: no destructors, no buffers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: never returns.
    unsafe { libc::_exit(code) }
}

/// Closes all descriptors from `first` on that aren't in `kept`, which ascends.
///
/// # Safety
/// Nothing in this process may use a descriptor that it closes.
pub unsafe fn close_all_but(first: u32, kept: &[OwnedFd]) {
    let close = |from: u32, to: u32| {
        if from <= to {
            // SAFETY: as the caller promises.
            unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
        }
    };
    let mut next = first;
    for kept in kept.iter().map(|kept| kept.as_raw_fd() as u32) {
        close(next, kept.wrapping_sub(1));
        next = kept + 1;
    }
    close(next, u32::MAX);
}

/// Duplicates whose numbers ascend.
pub fn ascending(fds: &[OwnedFd]) -> Result<Vec<OwnedFd>, Errno> {
    let mut next = 3;
    let mut out = Vec::with_capacity(fds.len());
    for fd in fds {
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, next)?;
        next = copy.as_raw_fd() + 1;
        out.push(copy);
    }
    Ok(out)
}

/// Puts this thread before all others that aren't of that kind, or back among them. Its children aren't concerned.
pub fn set_realtime(on: bool) -> Result<(), Errno> {
    match on {
        true => schedule(libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1),
        false => schedule(libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, 0),
    }
}

/// Gives this thread the most of the CPU that one among others can have. Its children are like all others.
pub fn set_important() -> Result<(), Errno> {
    schedule(libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK, 0)?;
    rustix::process::setpriority_process(None, -20)
}

/// Has this thread, when it wakes, wait until whoever runs then has to wait for something; or no longer. Its children
/// have it from it.
pub fn set_patient(on: bool) -> Result<(), Errno> {
    schedule(if on { libc::SCHED_BATCH } else { libc::SCHED_OTHER }, 0)
}

fn schedule(policy: i32, priority: i32) -> Result<(), Errno> {
    let param = libc::sched_param { sched_priority: priority };
    // SAFETY: the record lives through the call. The system call itself, for the C library has its own idea of threads.
    match unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const param) } {
        0 => Ok(()),
        _ => Err(errno::last()),
    }
}

/// `prctl` with integer arguments.
pub fn prctl(option: i32, arg2: u64, arg3: u64) -> Result<i32, Errno> {
    // SAFETY: used with options that take integers only.
    match unsafe { libc::prctl(option, arg2, arg3, 0u64, 0u64) } {
        -1 => Err(errno::last()),
        value => Ok(value),
    }
}

/// A signalfd for `signal`, which is blocked for this process from now on.
pub fn signalfd(signal: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the set is initialised by sigemptyset before it is read; the calls take valid pointers to it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
            return Err(errno::last());
        }
        match libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
            -1 => Err(errno::last()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}

/// Unblocks every signal and gives SIGPIPE its default action back: what `exec` must not inherit from the agent.
pub fn reset_signals() {
    // SAFETY: sets plain values through pointers that live through the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

/// Ignores a signal.
pub fn ignore_signal(signal: i32) {
    // SAFETY: SIG_IGN is a valid disposition.
    unsafe {
        libc::signal(signal, libc::SIG_IGN);
    }
}

/// Lets the allocator keep what messages come and go through: given back to the kernel, it would be faulted in anew for
/// each of them.
pub fn keep_heap() {
    // SAFETY: sets parameters of the allocator, before there are threads.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 2 << 20);
    }
}

/// `kill`; a negative pid is a process group.
pub fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: takes integers only.
    match unsafe { libc::kill(pid, signal) } {
        0 => Ok(()),
        _ => Err(errno::last()),
    }
}

/// Switches a network interface on (netdevice(7), SIOCSIFFLAGS).
pub fn interface_up(name: &std::ffi::CStr) -> Result<(), Errno> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: a plain record; zero is a value of each of its fields.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.to_bytes()) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads the record, whose name ends in NUL, during the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) } {
        0 => Ok(()),
        _ => Err(errno::last()),
    }
}

/// Reads once, filling the capacity of one buffer after the other. Buffers must be empty.
pub fn read_into(fd: BorrowedFd<'_>, buffers: &mut [Vec<u8>]) -> Result<usize, Errno> {
    let slots: Vec<libc::iovec> = buffers
        .iter_mut()
        .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.capacity() })
        .collect();
    // SAFETY: each slot is the whole memory of a buffer, which nobody else uses during the call.
    let read = unsafe { libc::readv(fd.as_raw_fd(), slots.as_ptr(), slots.len() as i32) };
    let mut left = usize::try_from(read).map_err(|_| errno::last())?;
    for buffer in buffers {
        let size = left.min(buffer.capacity());
        // SAFETY: the kernel has written so much of it, as it fills them in turn.
        unsafe { buffer.set_len(size) };
        left -= size;
    }
    Ok(read as usize)
}

/// Lets other processes have the CPU for a moment, where some want it.
pub fn let_others_run() {
    // Who is more important than all others is chosen again at once: it is one among them meanwhile.
    let own = rustix::process::getpriority_process(None).unwrap_or(0);
    let _ = rustix::process::setpriority_process(None, own.max(0));
    // SAFETY: takes nothing.
    unsafe { libc::sched_yield() };
    let _ = rustix::process::setpriority_process(None, own);
}

/// How many bytes wait in a pipe.
pub fn readable_bytes(fd: BorrowedFd<'_>) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int to the pointer.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) } {
        0 => usize::try_from(count).unwrap_or(0),
        _ => 0,
    }
}

/// What a clock shows, by the C library: rustix would look up the vDSO for itself, code that a guest executes for this alone.
pub fn time_of(clock: libc::clockid_t) -> Timespec {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec to the pointer.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    Timespec { tv_sec: now.tv_sec, tv_nsec: now.tv_nsec }
}

/// The same in nanoseconds.
pub fn now_ns(clock: libc::clockid_t) -> i64 {
    let now = time_of(clock);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}
