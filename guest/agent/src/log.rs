//! Short lines to the kernel's log, which the host reads from the console. Never the user's data: only what the agent
//! itself does, with ids it has validated.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

static KMSG: OnceLock<File> = OnceLock::new();
/// Longest line written.
const MAX_LINE: usize = 200;

/// Opens `/dev/kmsg`. Before this, and when it fails, lines are dropped.
pub fn open() {
    if let Ok(file) = File::options().write(true).open("/dev/kmsg") {
        let _ = KMSG.set(file);
    }
}

/// Writes one line. Use it through [`log!`](crate::log!).
pub fn write(args: fmt::Arguments<'_>) {
    let Some(mut file) = KMSG.get() else { return };
    let _ = file.write_all(line(args).as_bytes());
}

/// Writes one line that is also shown on the console: the last one.
pub fn alarm(args: fmt::Arguments<'_>) {
    let Some(mut file) = KMSG.get() else { return };
    let _ = file.write_all(line(args).replacen("<6>", "<2>", 1).as_bytes());
}

fn line(args: fmt::Arguments<'_>) -> String {
    let mut text = format!("<6>pykata: {args}");
    if text.len() > MAX_LINE {
        let cut = (0..=MAX_LINE).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(cut);
    }
    text.retain(|c| !c.is_control());
    text.push('\n');
    text
}

/// Logs one line: `log!("serving on {port}")`.
#[macro_export]
macro_rules! log {
    ($($arg:tt)*) => { $crate::log::write(format_args!($($arg)*)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_single() {
        assert_eq!(line(format_args!("a\nb")), "<6>pykata: ab\n");
        assert!(line(format_args!("{}", "é".repeat(500))).len() <= MAX_LINE + 1);
    }
}
