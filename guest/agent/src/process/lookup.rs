//! Finding and executing the command, and saying in one line why that failed.

use std::convert::Infallible;
use std::ffi::{CStr, c_char};

use rustix::fs::{Access, AtFlags, CWD, FileType};
use rustix::io::Errno;

use crate::errno;

/// A command that couldn't be executed, as a shell reports it.
#[derive(Debug, PartialEq, Eq)]
pub struct NotExecuted {
    pub code: i32,
    pub line: String,
}

/// A command, made ready beforehand: to execute it takes no memory.
pub struct Command<'a> {
    name: &'a CStr,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    path: &'a str,
    /// For one path after the other.
    candidate: Vec<u8>,
}

impl<'a> Command<'a> {
    /// `args`, looked up in `path` unless the name has a slash.
    pub fn new(args: &'a [impl AsRef<CStr>], env: &'a [impl AsRef<CStr>], path: &'a str) -> Self {
        let name = args[0].as_ref();
        let longest = path.split(':').map(str::len).max().unwrap_or(0);
        let candidate = Vec::with_capacity(longest + name.count_bytes() + 3);
        Self { name, argv: pointers(args), envp: pointers(env), path, candidate }
    }

    /// Executes it. Returns only on failure.
    pub fn execute(&mut self) -> NotExecuted {
        let name = self.name;
        let bytes = name.to_bytes();
        if bytes.is_empty() {
            return not_executed(name, 127, "command not found");
        }
        if bytes.contains(&b'/') {
            let Err(errno) = exec(name, &self.argv, &self.envp);
            return explain(name, name, errno);
        }
        let mut denied = None;
        for dir in self.path.split(':') {
            let candidate = join(&mut self.candidate, dir, name);
            let Err(errno) = exec(candidate, &self.argv, &self.envp);
            match errno {
                Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG | Errno::LOOP => {}
                Errno::ACCESS => denied = denied.or(Some(dir)),
                _ => return explain(name, candidate, errno),
            }
        }
        self.not_found(denied)
    }

    /// After all directories: a file that is there although it wasn't found has an interpreter that isn't. To look for
    /// that on the way, as shells do, would take as long as the search itself.
    fn not_found(&mut self, denied: Option<&str>) -> NotExecuted {
        let name = self.name;
        if let Some(dir) = denied {
            return explain(name, join(&mut self.candidate, dir, name), Errno::ACCESS);
        }
        for dir in self.path.split(':') {
            let candidate = join(&mut self.candidate, dir, name);
            if exists(candidate) {
                return explain(name, candidate, Errno::NOENT);
            }
        }
        not_executed(name, 127, "command not found")
    }
}

/// The path of a name in a directory of PATH.
fn join<'b>(buffer: &'b mut Vec<u8>, dir: &str, name: &CStr) -> &'b CStr {
    let dir = if dir.is_empty() { "." } else { dir };
    buffer.clear();
    [dir.as_bytes(), b"/", name.to_bytes_with_nul()].iter().for_each(|part| buffer.extend(*part));
    CStr::from_bytes_until_nul(buffer).unwrap_or_default()
}

fn pointers(list: &[impl AsRef<CStr>]) -> Vec<*const c_char> {
    list.iter().map(|text| text.as_ref().as_ptr()).chain([std::ptr::null()]).collect()
}

fn exec(file: &CStr, argv: &[*const c_char], envp: &[*const c_char]) -> Result<Infallible, Errno> {
    // SAFETY: both lists end in NULL and point to strings that live through the call.
    unsafe { libc::execve(file.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    Err(errno::last())
}

fn exists(path: &CStr) -> bool {
    rustix::fs::accessat(CWD, path, Access::EXISTS, AtFlags::empty()).is_ok()
}

fn explain(name: &CStr, path: &CStr, errno: Errno) -> NotExecuted {
    let is_dir = || rustix::fs::stat(path).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory);
    match errno {
        Errno::NOENT if exists(path) => not_executed(name, 126, "its interpreter or loader was not found"),
        Errno::NOENT | Errno::NOTDIR => not_executed(name, 127, "no such file or directory"),
        Errno::ACCESS if is_dir() => not_executed(name, 126, "is a directory"),
        Errno::ACCESS => not_executed(name, 126, "permission denied"),
        Errno::NOEXEC => not_executed(name, 126, "exec format error"),
        Errno::TOOBIG => not_executed(name, 126, "argument list too long"),
        Errno::TXTBSY => not_executed(name, 126, "text file busy"),
        other => not_executed(name, 126, &errno::name(other)),
    }
}

fn not_executed(name: &CStr, code: i32, why: &str) -> NotExecuted {
    let shown: String = name.to_string_lossy().chars().take(200).flat_map(char::escape_debug).collect();
    NotExecuted { code, line: format!("pykata: {shown}: {why}\n") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;

    fn run(name: &str, path: &str) -> (i32, String) {
        let args = [CString::new(name).expect("no NUL")];
        let failed = Command::new(&args, &[] as &[CString], path).execute();
        (failed.code, failed.line)
    }

    #[test]
    fn as_a_shell_says_it() {
        assert_eq!(run("no-such", "/bin:/usr/bin"), (127, "pykata: no-such: command not found\n".into()));
        assert_eq!(run("/no/such", ""), (127, "pykata: /no/such: no such file or directory\n".into()));
        assert_eq!(run("/etc", ""), (126, "pykata: /etc: is a directory\n".into()));
        assert_eq!(run("/etc/passwd", ""), (126, "pykata: /etc/passwd: permission denied\n".into()));
        assert_eq!(run("passwd", "/nowhere:/etc"), (126, "pykata: passwd: permission denied\n".into()));
        assert_eq!(run("", "/bin"), (127, "pykata: : command not found\n".into()));
    }

    #[test]
    fn formats_and_interpreters() {
        use std::os::unix::fs::PermissionsExt;
        let dir = std::env::temp_dir().join(format!("pykata-lookup-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("mkdir");
        for (name, text, want) in [
            ("data", "hello", "exec format error"),
            ("script", "#!/no/interpreter\n", "its interpreter or loader was not found"),
        ] {
            let file = dir.join(name);
            std::fs::write(&file, text).expect("write");
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).expect("chmod");
            let found = run(file.to_str().expect("utf-8"), "");
            assert_eq!(found, (126, format!("pykata: {}: {want}\n", file.display())));
            assert_eq!(run(name, dir.to_str().expect("utf-8")), (126, format!("pykata: {name}: {want}\n")));
        }
        std::fs::remove_dir_all(dir).expect("rm");
    }

    #[test]
    fn the_line_is_one_line() {
        let (_, line) = run("a\nb\u{1b}[31m", "/bin");
        assert_eq!(line, "pykata: a\\nb\\u{1b}[31m: command not found\n");
    }
}
