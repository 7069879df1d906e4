use clap::CommandFactory as _;
use clap::error::ErrorKind;

use super::*;
use crate::capture::CaptureConfig;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

fn run(line: &str) -> Box<Run> {
    match parse(line).unwrap().command {
        Command::Run(run) => run,
        other => panic!("{other:?}"),
    }
}

#[test]
fn command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn run_has_the_documented_defaults() {
    let run = run("mesh-agent run --node n1 --manifests /m --ca-dir /c");
    assert_eq!(run.trust_domain.as_str(), "cluster.local");
    assert_eq!(run.cgroup, PathBuf::from("/sys/fs/cgroup"));
    assert_eq!(run.bpffs, PathBuf::from("/sys/fs/bpf/malla"));
    assert_eq!(run.tunnel_port.get(), 15019);
    assert_eq!(run.metrics_addr, "[::]:15020".parse().unwrap());
    assert_eq!(run.ready_addr, "127.0.0.1:15021".parse().unwrap());
    assert_eq!(run.admin.socket, PathBuf::from("/run/malla/admin.sock"));
    assert_eq!(run.carrier, CarrierChoice::Auto);
    assert_eq!(run.workers, None);
    let sizes = CaptureConfig::default();
    assert_eq!(run.max_pods, sizes.max_pods);
    assert_eq!(run.max_destinations, sizes.max_destinations);
    assert_eq!(run.max_flows, sizes.max_flows);
    assert_eq!(run.max_verdicts, sizes.max_verdicts);
    assert_eq!(run.redirect_peer.is_on(), sizes.redirect_peer);
    assert_eq!(run.connect_timeout, Duration::from_secs(5));
    assert_eq!(run.unknown_pods, Duration::from_secs(5));
    assert_eq!(run.drain, Duration::from_secs(25));
    assert_eq!(run.cert_lifetime, Duration::from_secs(86_400));
    assert_eq!(run.signer, "malla.dev/workload");
    assert_eq!(run.access_log, AccessLogFormat::Text);
    assert_eq!(run.log_format, LogFormat::Text);
    assert_eq!(run.log, "info");
}

#[test]
fn every_flag_of_run_can_be_set_in_the_environment() {
    let command = Cli::command();
    let run = command.find_subcommand("run").unwrap();
    let ca_run = command.find_subcommand("ca").unwrap().find_subcommand("run").unwrap();
    let arguments = run.get_arguments().chain(ca_run.get_arguments());
    for arg in arguments.filter(|arg| arg.get_long() != Some("help")) {
        let Some(long) = arg.get_long().filter(|long| *long != "version") else {
            continue;
        };
        let expected = format!("MESH_{}", long.to_uppercase().replace('-', "_"));
        assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(&*expected), "--{long}");
        assert!(arg.get_help().is_some(), "--{long} has no help");
    }
}

/// What was checked would else not be what is run.
#[test]
fn check_takes_the_flags_that_run_has_as_run_does() {
    let command = Cli::command();
    let [run, check] = ["run", "check"].map(|name| command.find_subcommand(name).unwrap());
    let mut shared = Vec::new();
    for arg in check.get_arguments().filter(|arg| arg.get_env().is_some()) {
        let long = arg.get_long().unwrap();
        let same = run.get_arguments().find(|same| same.get_long() == Some(long));
        let same = same.unwrap_or_else(|| panic!("run has no --{long}"));
        assert_eq!(arg.get_env(), same.get_env(), "--{long}");
        assert_eq!(arg.get_default_values(), same.get_default_values(), "--{long}");
        assert_eq!(arg.get_value_delimiter(), same.get_value_delimiter(), "--{long}");
        shared.push(long);
    }
    for flag in ["tunnel-port", "metrics-addr", "ready-addr", "kubelet-cgroup", "pod-cidrs"] {
        assert!(shared.contains(&flag), "--{flag}");
    }
}

#[test]
fn roots_are_beside_the_ca_or_where_the_deployment_puts_them() {
    let bundle = |flags: &str| run(&format!("mesh-agent run --node n1 {flags}")).bundle();
    let mounted = PathBuf::from("/etc/malla/trust/bundle.pem");
    assert_eq!(bundle("--manifests /m"), mounted);
    assert_eq!(bundle("--manifests /m --ca-dir /c"), PathBuf::from("/c/bundle.pem"));
    let named = bundle("--manifests /m --ca-dir /c --trust-bundle /b.pem");
    assert_eq!(named, PathBuf::from("/b.pem"));
}

#[test]
fn label_groups_are_a_list() {
    let run = run(
        "mesh-agent run --node n1 --manifests /m --ca-dir /c --metrics-drop-labels principal,app",
    );
    assert_eq!(run.metrics_drop_labels, [LabelGroup::Principal, LabelGroup::App]);
}

#[test]
fn wrong_usage_ends_with_2() {
    for line in [
        "mesh-agent",
        "mesh-agent run",
        "mesh-agent run --node n1 --manifests /m --ca-dir /c --tunnel-port 0",
        "mesh-agent run --node n1 --manifests /m --ca-dir /c --carrier pigeon",
        "mesh-agent run --node n1 --manifests /m --ca-dir /c --drain-s soon",
        "mesh-agent run --node n1 --manifests /m --ca-dir /c --log debgu",
        "mesh-agent run --node n1 --manifests /m --ca-dir /c --trust-domain A",
        "mesh-agent status -o xml",
        // What is told of the agent as a whole belongs to no namespace.
        "mesh-agent status -n shop",
        "mesh-agent version -n shop",
        "mesh-agent log debgu",
    ] {
        let error = parse(line).unwrap_err();
        assert_ne!(error.kind(), ErrorKind::DisplayHelp, "{line}");
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}
