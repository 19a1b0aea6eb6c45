//! `/init` of the guest. Without Rust's `main`: its start-up code aborts when there is no `/dev/null` to put in place of
//! a missing stdin, and the kernel may start PID 1 without a console.
#![no_main]

use std::ffi::{CStr, c_char, c_int};

use pykata_agent::{boot, rehearsal};

#[unsafe(no_mangle)]
extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    // SAFETY: the kernel gives as many strings as it says, and they stay.
    let role = (argc == 2).then(|| unsafe { CStr::from_ptr(*argv.add(1)) });
    match role {
        Some(role) if role == rehearsal::ROLE => rehearsal::run(),
        _ => boot::pid1(),
    }
}
