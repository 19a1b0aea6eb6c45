//! `/init` of the guest. Without Rust's `main`: its start-up code aborts when there is no `/dev/null` to put in place of
//! a missing stdin, and the kernel may start PID 1 without a console.
#![no_main]

use std::ffi::{c_char, c_int};

#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: c_int, _argv: *const *const c_char) -> c_int {
    pykata_agent::boot::pid1()
}
