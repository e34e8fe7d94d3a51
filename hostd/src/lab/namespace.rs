//! Network namespaces: making them, entering them, and configuring links in them with `ip -batch`.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

use super::error::{LabError, LabResult};

/// Where iproute2 keeps named namespaces.
pub(crate) const DIRECTORY: &str = "/run/netns";

/// A named network namespace. Dropping the handle does not remove it: [`super::sweep`] does, after its processes.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Makes a namespace with a running loopback and without IPv6 (whose router solicitations would only disturb
    /// measurements).
    ///
    /// # Errors
    /// When `ip` is missing or refuses, for example because this is not root.
    pub fn create(name: &str) -> LabResult<Self> {
        ip(&["netns", "add", name])?;
        let namespace = Self::open(name)?;
        namespace.run(|| {
            for scope in ["all", "default"] {
                // A kernel without IPv6 has no such file, and needs none.
                let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1");
            }
        })?;
        namespace.batch(&["link set dev lo up".to_owned()])?;
        Ok(namespace)
    }

    /// A namespace that exists.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn open(name: &str) -> LabResult<Self> {
        let path = Path::new(DIRECTORY).join(name);
        let file = File::open(&path).map_err(LabError::io("open", path))?;
        Ok(Self { name: name.to_owned(), file })
    }

    /// Its name, as `ip netns exec NAME` takes it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Moves the calling thread, and only it, into the namespace.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self) -> LabResult<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|errno| LabError::Enter { name: self.name.clone(), source: errno.into() })
    }

    /// Calls `work` on a thread inside the namespace. Sockets that it opens stay there.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> LabResult<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| self.enter().map(|()| work()));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Makes `command` start inside the namespace.
    ///
    /// # Errors
    /// When the namespace's descriptor cannot be duplicated.
    pub fn place(&self, command: &mut Command) -> LabResult<()> {
        let path = Path::new(DIRECTORY).join(&self.name);
        let file = self.file.try_clone().map_err(LabError::io("duplicate", path))?;
        // SAFETY: between fork and exec the closure only calls setns(2), which is async-signal-safe, on a descriptor
        // that it owns.
        unsafe {
            command.pre_exec(move || setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(Into::into));
        }
        Ok(())
    }

    /// Runs lines of `ip` commands in the namespace in one go.
    ///
    /// # Errors
    /// The first line that fails ends the batch and is named.
    pub fn batch(&self, lines: &[String]) -> LabResult<()> {
        batch(&["-n", &self.name], lines)
    }

    /// `tc ARGUMENTS` in the namespace.
    ///
    /// # Errors
    /// When it reports a failure.
    pub fn tc(&self, arguments: &str) -> LabResult<()> {
        let mut all = vec!["-n", self.name.as_str()];
        all.extend(arguments.split_whitespace());
        run_tool("tc", &all, "").map(drop)
    }
}

/// Names of the namespaces that begin with `prefix`.
pub(crate) fn list(prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// Processes whose main thread is in the namespace.
pub(crate) fn processes(name: &str) -> Vec<i32> {
    use std::os::unix::fs::MetadataExt;
    let inode = |path: PathBuf| std::fs::metadata(path).map(|data| (data.dev(), data.ino())).ok();
    let Some(wanted) = inode(Path::new(DIRECTORY).join(name)) else { return Vec::new() };
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| inode(format!("/proc/{pid}/ns/net").into()) == Some(wanted)).collect()
}

/// `ip ARGUMENTS`; its standard output.
pub(crate) fn ip(arguments: &[&str]) -> LabResult<String> {
    run_tool("ip", arguments, "")
}

/// `ip -batch` in this process's namespace, or with `-n NAME` in another one.
pub(crate) fn batch(options: &[&str], lines: &[String]) -> LabResult<()> {
    let mut input = String::new();
    for line in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(input, "{line}");
    }
    let mut arguments = options.to_vec();
    arguments.extend(["-batch", "-"]);
    run_tool("ip", &arguments, &input).map(drop)
}

fn run_tool(program: &str, arguments: &[&str], input: &str) -> LabResult<String> {
    let fail = |source| LabError::Tool { program: program.to_owned(), source };
    // A process group of its own: Ctrl-C at the terminal is for us, and must not end it half-way.
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(fail)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A tool that ended early says why on its standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(fail)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let command = format!("{program} {}{}{input}", arguments.join(" "), if input.is_empty() { "" } else { " with " });
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(LabError::Command { command: command.trim().to_owned(), stderr })
}
