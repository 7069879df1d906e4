//! What the numbers were measured on.

use std::process::Command;
use std::{fmt, fs, process, thread};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// The machine, and how this run uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Machine {
    kernel: String,
    processor: String,
    cores: usize,
    /// The cores that everything was held to, `None` when the scheduler was free.
    pinned: Option<String>,
}

impl Machine {
    /// Looks, and holds this process and all that it starts to the cores `pin`, if given.
    ///
    /// # Errors
    ///
    /// Fails when `pin` is no list of cores that this process may use.
    pub(crate) fn new(pin: Option<String>) -> Result<Self> {
        if let Some(cores) = &pin {
            let pid = process::id().to_string();
            let done = Command::new("taskset")
                .args(["--cpu-list", "--pid", cores, &pid])
                .output()
                .context("run taskset")?;
            let why = String::from_utf8_lossy(&done.stderr);
            ensure!(done.status.success(), "--pin {cores}: {}", why.trim());
        }
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel")?;
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Ok(Self {
            kernel: kernel.trim().to_owned(),
            processor: model(&processors).unwrap_or("unknown").to_owned(),
            cores: processors.lines().filter(|line| line.starts_with("processor")).count().max(
                // Where `/proc/cpuinfo` names none.
                thread::available_parallelism().map_or(1, Into::into),
            ),
            pinned: pin,
        })
    }

    /// As the `machine` of the JSON.
    pub(crate) fn json(&self) -> Value {
        json!({
            "kernel": self.kernel,
            "processor": self.processor,
            "cores": self.cores,
            "pinned": self.pinned,
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, processor, cores, pinned } = self;
        write!(f, "Linux {kernel}, {cores} cores ({processor}), ")?;
        match pinned {
            Some(cores) => write!(f, "everything pinned to core {cores}"),
            None => write!(f, "not pinned"),
        }
    }
}

fn model(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_name_is_found() {
        assert_eq!(model("processor\t: 0\nmodel name\t: Some CPU\n"), Some("Some CPU"));
        assert_eq!(model("processor\t: 0\n"), None);
    }

    #[test]
    fn the_machine_says_whether_it_is_pinned() {
        let free = Machine::new(None).unwrap();
        assert!(free.to_string().ends_with("not pinned"), "{free}");
        assert!(free.json()["pinned"].is_null());
        let pinned = Machine { pinned: Some("0".to_owned()), ..free };
        assert!(pinned.to_string().ends_with("pinned to core 0"), "{pinned}");
    }
}
