//! `cargo xtask kernel PACKAGE`: boots another kernel than this machine's in an emulator, and runs there what
//! depends on the kernel: `mesh-agent check`, the tests that load the programs and connect through them, and
//! those that find pods by their cgroups.
//!
//! The emulator needs no virtualisation of the processor's and no privilege. Everything is in the initial
//! file system: programs, their libraries, and the modules of the package.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use crate::build::{Executable, executables};
use crate::process::{Finished, answer, installed, must, watch};
use crate::{say, setup};

const INIT: &str = include_str!("init.sh");

/// What does the work, and Debian's packages that have it. Busybox must need no library.
const TOOLS: [(&str, &str); 5] = [
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("dpkg-deb", "dpkg"),
    ("strip", "binutils"),
];

/// Of `lib/modules/*/kernel`.
const MODULES: [&str; 6] =
    ["net", "lib", "crypto", "arch", "drivers/net/veth.ko", "drivers/net/dummy.ko"];
/// How a module's file may be compressed: what Debian uses and busybox reads.
const COMPRESSED: [&str; 2] = ["", ".xz"];

/// Programs of this machine that the tests call.
const PROGRAMS: [&str; 1] = ["ip"];

/// What `init` says when all of a program went well.
const WENT_WELL: [&str; 3] =
    ["check: exit code 0", "capture: exit code 0", "processes: exit code 0"];

/// An emulated processor is some ten times slower than this one.
const LIMIT: Duration = Duration::from_secs(1800);

#[derive(Debug, Args)]
pub(crate) struct Kernel {
    /// A package of Debian's with a kernel and its modules for this machine's processor, such as `apt-get download
    /// linux-image-6.1.0-53-amd64` brings.
    package: PathBuf,

    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// The emulator of this machine's processor: the program, its package, a machine, and the console.
struct Emulator {
    program: &'static str,
    package: &'static str,
    machine: &'static str,
    processor: &'static str,
    console: &'static str,
}

impl Emulator {
    fn of_this_machine() -> Result<Self> {
        Ok(match std::env::consts::ARCH {
            "x86_64" => Self {
                program: "qemu-system-x86_64",
                package: "qemu-system-x86",
                machine: "q35",
                // QEMU 7.2 emulates CMPXCHG16B wrongly, and Linux 6.12 dies of it.
                processor: "max,-cx16",
                console: "ttyS0",
            },
            "aarch64" => Self {
                program: "qemu-system-aarch64",
                package: "qemu-system-arm",
                machine: "virt",
                processor: "max",
                console: "ttyAMA0",
            },
            other => bail!("no emulator is known for {other}"),
        })
    }
}

impl Kernel {
    /// Says what did not work there, and fails if something did not that should.
    pub(crate) fn run(&self) -> Result<()> {
        let emulator = Emulator::of_this_machine()?;
        let emulates = [(emulator.program, emulator.package)];
        let tools = TOOLS.iter().chain(&emulates);
        let missing: Vec<_> =
            tools.filter(|(tool, _)| !installed(tool)).map(|(_, package)| *package).collect();
        ensure!(missing.is_empty(), "missing; run: apt-get install {}", missing.join(" "));
        setup::toolchain()?;
        let mut programs = executables("building", "build --package mesh-agent --bin mesh-agent")?;
        programs.extend(executables(
            "building the tests",
            "test --no-run --package mesh-agent --test capture --test processes",
        )?);

        let dir = Scratch::new()?;
        let (kernel, modules) = unpack(&self.package, &dir.0.join("package"))?;
        let image = initial_image(&dir.0, &programs, &modules)?;
        let mut boot = Command::new(emulator.program);
        boot.args(["-machine", emulator.machine, "-accel", "tcg", "-smp", "2"]);
        boot.args(["-cpu", emulator.processor]);
        boot.args(["-m", "4G", "-nographic", "-no-reboot", "-kernel"]).arg(&kernel);
        boot.arg("-initrd").arg(&image);
        // `init` has them in its environment.
        let tests =
            self.filter.as_deref().map_or_else(String::new, |only| format!(" TESTS={only}"));
        boot.arg("-append").arg(format!("console={} panic=-1 quiet{tests}", emulator.console));
        tell(&watch("emulator", boot, LIMIT)?)
    }
}

/// What the kernel unpacks into memory and starts `init` of.
fn initial_image(dir: &Path, programs: &[Executable], modules: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    for place in ["bin", "dev", "proc", "sys", "tmp", "run", "programs"] {
        make_dir(&root.join(place))?;
    }
    let init = root.join("init");
    fs::write(&init, INIT).context("write init")?;
    fs::set_permissions(&init, Permissions::from_mode(0o755)).context("make init a program")?;
    copy(&found("busybox")?, &root.join("bin/busybox"))?;
    for program in programs {
        // The debugger's part of a program is ten times the rest, and all is kept in memory.
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(root.join("programs").join(&program.name)).arg(&program.path);
        must("strip", strip, LIMIT)?;
        copy_libraries(&program.path, &root)?;
    }
    for program in PROGRAMS {
        let path = found(program)?;
        copy(&path, &root.join("usr/bin").join(program))?;
        copy_libraries(&path, &root)?;
    }
    copy_modules(modules, &root)?;
    let image = dir.join("initrd");
    let mut pack = Command::new("sh");
    pack.args(["-c", "find . | cpio --create --format=newc --quiet | gzip -1 >\"$0\""]);
    pack.arg(&image).current_dir(&root);
    must("packing", pack, LIMIT)?;
    Ok(image)
}

/// Shows what the emulated machine has said.
fn tell(ran: &Finished) -> Result<()> {
    // A serial line ends its lines as terminals do.
    let lines: Vec<_> = ran.lines.iter().map(|line| line.trim_end()).collect();
    let from = lines.iter().position(|line| line.starts_with("kernel: "));
    let lines = from.map(|from| &lines[from..]).unwrap_or_default();
    let is_news = |line: &&&str| !line.starts_with("√") && !line.ends_with("... ok");
    for line in lines.iter().filter(is_news) {
        say(line);
    }
    for wanted in WENT_WELL {
        ensure!(lines.contains(&wanted), "no `{wanted}` ({})\n{}", ran.how, ran.tail());
    }
    Ok(())
}

/// A directory that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("malla-{}-kernel", std::process::id()));
        make_dir(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

/// The kernel in `package`, and the directory of its modules, which is called after its version.
fn unpack(package: &Path, dir: &Path) -> Result<(PathBuf, PathBuf)> {
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("--extract").arg(package).arg(dir);
    must("unpacking", unpack, LIMIT)?;
    let boot = entries(&dir.join("boot"));
    let kernel = boot.into_iter().find(|path| name(path).starts_with("vmlinu"));
    let modules = ["lib/modules", "usr/lib/modules"].map(|place| entries(&dir.join(place)));
    let modules = modules.into_iter().flatten().next();
    kernel.zip(modules).with_context(|| {
        let package = package.display();
        format!("{package} has no boot/vmlinuz-*, or no lib/modules: not the package of a kernel with its modules")
    })
}

fn copy_modules(modules: &Path, root: &Path) -> Result<()> {
    let version = name(modules);
    let to = root.join("lib/modules").join(&version);
    for place in MODULES {
        for compressed in COMPRESSED {
            let from = modules.join("kernel").join(format!("{place}{compressed}"));
            if from.exists() {
                let parent = to
                    .join("kernel")
                    .join(Path::new(place).parent().unwrap_or_else(|| Path::new("")));
                make_dir(&parent)?;
                let mut copy = Command::new("cp");
                copy.arg("-a").arg(&from).arg(&parent);
                must("copying modules", copy, LIMIT)?;
            }
        }
    }
    for list in ["modules.builtin", "modules.order", "modules.builtin.modinfo"] {
        if modules.join(list).exists() {
            copy(&modules.join(list), &to.join(list))?;
        }
    }
    let mut depmod = Command::new(found("depmod")?);
    depmod.arg("-b").arg(root).arg(version);
    must("depmod", depmod, LIMIT).map(drop)
}

/// The libraries that a program needs, where it looks for them: ldd(1).
fn copy_libraries(program: &Path, root: &Path) -> Result<()> {
    let said = answer("ldd", &[&program.to_string_lossy()]).unwrap_or_default();
    for library in libraries(&said) {
        let place = library.trim_start_matches('/');
        copy(Path::new(library), &root.join(place))?;
    }
    Ok(())
}

/// The absolute paths in what `ldd` says: `libc.so.6 => /lib/… (0x…)`, and the loader alone.
fn libraries(said: &str) -> impl Iterator<Item = &str> {
    said.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    make_dir(to.parent().context("no directory")?)?;
    fs::copy(from, to).with_context(|| format!("copy {}", from.display())).map(drop)
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Where a program lies; what only root needs may be out of the `PATH`.
fn found(program: &str) -> Result<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/sbin"]);
    let mut files = places.map(|place| Path::new(place).join(program));
    files.find(|file| file.is_file()).with_context(|| format!("no {program}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_where_ldd_says() {
        let said =
            "\tlinux-vdso.so.1 (0x1)\n\tlibc.so.6 => /lib/libc.so.6 (0x2)\n\t/lib64/ld.so (0x3)";
        assert_eq!(libraries(said).collect::<Vec<_>>(), ["/lib/libc.so.6", "/lib64/ld.so"]);
    }

    #[test]
    fn machine_that_does_not_say_that_all_went_well_has_failed() {
        let ran = |lines: &[String]| Finished {
            success: true,
            how: "exit code 0".to_owned(),
            lines: lines.to_vec(),
            took: Duration::ZERO,
        };
        let begin = ["BIOS", "kernel: 6.1 x\r", "√ a\r"].map(str::to_owned);
        let with = |ends: &[String]| tell(&ran(&[&begin[..], ends].concat()));
        let well = WENT_WELL.map(|line| format!("{line}\r"));
        with(&well).unwrap();
        for nth in 0..well.len() {
            let mut ends = well.to_vec();
            ends[nth] = ends[nth].replace('0', "1");
            with(&ends).unwrap_err();
            ends.remove(nth);
            with(&ends).unwrap_err();
        }
        tell(&ran(&[])).unwrap_err();
    }
}
