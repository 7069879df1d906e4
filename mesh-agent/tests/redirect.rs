//! Whose devices are taken: of two agents whoever came first keeps one, and what is no plain cable is left alone. Needs
//! root, `ip` and `nsenter`.
//!
//! What the agent takes for the node's namespace is the one it runs in, so this test runs itself again in
//! a namespace that it made.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends at the first thing that goes wrong"
)]

mod skip;

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, process};

use mesh_agent::capture::{Capture, CaptureConfig, NotRedirected, PodCapture};
use mesh_agent::net::Netns;
use mesh_core::settings::Settings;

/// Names the node's namespace to the copy of this test that runs in it.
const NODE: &str = "MALLA_TEST_NODE";
const PODS: [(&str, &str, &str); 2] =
    [("one", "10.91.0.2", "fd91::2"), ("two", "10.91.0.3", "fd91::3")];

fn run(line: &str) {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A node with two pods, removed on drop.
struct Node {
    name: String,
    cgroup: PathBuf,
    bpffs: PathBuf,
}

impl Node {
    fn new(name: String) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let cgroup = Path::new(mount.split(' ').nth(1).unwrap()).join(&name);
        let bpffs = env::temp_dir().join(&name);
        Self { name, cgroup, bpffs }
    }

    fn make(&self) {
        let node = &self.name;
        fs::create_dir(&self.cgroup).unwrap();
        fs::create_dir(&self.bpffs).unwrap();
        run(&format!("mount -t bpf bpf {}", self.bpffs.display()));
        run(&format!("ip netns add {node}"));
        for (pod, v4, v6) in PODS {
            run(&format!("ip netns add {node}-{pod}"));
            run(&format!(
                "ip -n {node} link add {pod} type veth peer name eth0 netns {node}-{pod}"
            ));
            run(&format!("ip -n {node} link set {pod} up"));
            run(&format!("ip -n {node}-{pod} link set lo up"));
            run(&format!("ip -n {node}-{pod} link set eth0 up"));
            run(&format!("ip -n {node}-{pod} addr add {v4}/32 dev eth0"));
            run(&format!("ip -n {node}-{pod} addr add {v6}/128 dev eth0 nodad"));
        }
    }

    fn agent(&self, name: &str) -> (CaptureConfig, Capture) {
        let config = CaptureConfig {
            cgroup: self.cgroup.clone(),
            bpffs: self.bpffs.join(name),
            max_pods: 16,
            max_destinations: 64,
            max_flows: 4096,
            max_verdicts: 64,
            redirect_peer: true,
        };
        let capture = Capture::start(&config).unwrap_or_else(|error| panic!("{error:?}"));
        for (pod, _, _) in PODS {
            self.enrol(&capture, pod);
        }
        capture
            .retain(&HashSet::from(PODS.map(|(pod, ..)| pod.to_owned())), &HashSet::new())
            .unwrap();
        (config, capture)
    }

    fn enrol(&self, capture: &Capture, pod: &str) {
        let (_, v4, v6) = PODS.iter().find(|(name, ..)| *name == pod).unwrap();
        let netns = Netns::open(&Path::new("/run/netns").join(format!("{}-{pod}", self.name)));
        let pod = PodCapture {
            uid: pod,
            ips: &[v4, v6].map(|ip| ip.parse::<IpAddr>().unwrap()),
            netns: &netns.unwrap(),
            settings: &Settings { preserve_client_address: false, ..Settings::default() },
            predecessor: None,
            outbound_listeners: 1,
            inbound_listeners: 1,
        };
        capture.enrol(&pod).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The copy runs in what its parent removes.
        if env::var_os(NODE).is_some() {
            return;
        }
        for (pod, ..) in PODS {
            run(&format!("ip netns del {}-{pod}", self.name));
        }
        run(&format!("ip netns del {}", self.name));
        run(&format!("umount -l {}", self.bpffs.display()));
        fs::remove_dir(&self.bpffs).unwrap();
        fs::remove_dir(&self.cgroup).unwrap();
    }
}

/// The pods that are redirected, and those that are not because of somebody else's program.
fn redirected(capture: &Capture) -> (Vec<String>, Vec<String>) {
    let (mut yes, mut no) = (Vec::new(), Vec::new());
    for (pod, how) in capture.redirect() {
        match how {
            Ok(()) => yes.push(pod),
            Err(NotRedirected::Foreign) => no.push(pod),
            Err(other) => panic!("{pod}: {other:?}"),
        }
    }
    (yes, no)
}

/// Runs `test`, which has this name, in a node made for it.
fn in_a_node(name: &str, test: impl FnOnce(&Node)) {
    if let Some(node) = env::var_os(NODE) {
        return test(&Node::new(node.into_string().unwrap()));
    }
    if !skip::unless_root("makes network namespaces and loads eBPF programs: run as root") {
        return;
    }
    let short = name.split('_').next().unwrap();
    let node = Node::new(format!("malla-{}-{short}", process::id()));
    node.make();
    let mut again = Command::new("nsenter");
    again.arg(format!("--net=/run/netns/{}", node.name)).arg(env::current_exe().unwrap());
    let output = again.args(["--exact", name]).env(NODE, &node.name).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn device_with_a_program_of_somebody_else_is_left_alone() {
    const NAME: &str = "device_with_a_program_of_somebody_else_is_left_alone";
    in_a_node(NAME, |node| {
        let pods = || PODS.map(|(pod, ..)| pod.to_owned()).to_vec();
        let (first_config, first) = node.agent("first");
        assert_eq!(redirected(&first), (pods(), vec![]));
        let (second_config, second) = node.agent("second");
        assert_eq!(redirected(&second), (vec![], pods()));
        assert_eq!(
            redirected(&first),
            (pods(), vec![]),
            "its own program is none of somebody else"
        );

        first.leave("one").unwrap();
        assert_eq!(redirected(&second), (vec!["one".into()], vec!["two".into()]));
        node.enrol(&first, "one");
        assert_eq!(redirected(&first), (vec!["two".into()], vec!["one".into()]));

        // The same agent again takes over what it left, and only that.
        drop(first);
        let (_, first) = node.agent("first");
        assert_eq!(redirected(&first), (vec!["two".into()], vec!["one".into()]));

        drop((first, second));
        for config in [&first_config, &second_config] {
            Capture::detach(&config.bpffs).unwrap();
        }
        let (config, third) = node.agent("third");
        assert_eq!(redirected(&third), (pods(), vec![]), "nothing was left");
        Capture::detach(&config.bpffs).unwrap();
    });
}

/// Each way that needs no kind of device but veth pairs and bridges, which every kernel has; undone, it is one again.
#[test]
fn cable_that_is_no_plain_one_is_told_and_taken_when_it_is_one_again() {
    const NAME: &str = "cable_that_is_no_plain_one_is_told_and_taken_when_it_is_one_again";
    in_a_node(NAME, |node| {
        let (config, capture) = node.agent("agent");
        let (out, pod) = (&node.name, format!("{}-two", node.name));
        let [_, (_, v4, v6)] = PODS;
        let moved = |from: &str, to: &str, ip: &str| {
            let (bits, nodad) = if ip == v4 { ("32", "") } else { ("128", " nodad") };
            [
                format!("-n {pod} addr del {ip}/{bits} dev {from}"),
                format!("-n {pod} addr add {ip}/{bits} dev {to}{nodad}"),
            ]
        };
        let both = |from: &str, to: &str| [moved(from, to, v4), moved(from, to, v6)].concat();
        let in_pod = |words: &str| format!("-n {pod} {words}");
        let bends: [(&str, Vec<String>, Vec<String>); 6] = [
            (
                "is down",
                vec![format!("-n {out} link set two down")],
                vec![format!("-n {out} link set two up")],
            ),
            (
                // An IPv6 address goes when its device is down.
                "no device of the pod has the address fd91::3",
                vec![in_pod("link set eth0 down")],
                vec![
                    in_pod("link set eth0 up"),
                    in_pod(&format!("addr add {v6}/128 dev eth0 nodad")),
                ],
            ),
            (
                "belongs to a bridge, a bond or a VRF, on the pod's side",
                vec![in_pod("link add br0 type bridge"), in_pod("link set eth0 master br0")],
                vec![in_pod("link del br0")],
            ),
            (
                "on several devices",
                [vec![in_pod("link add br0 type bridge")], moved("eth0", "br0", v6).into()]
                    .concat(),
                [moved("br0", "eth0", v6).into(), vec![in_pod("link del br0")]].concat(),
            ),
            (
                "no veth but \"bridge\"",
                [vec![in_pod("link add br0 type bridge")], both("eth0", "br0")].concat(),
                [both("br0", "eth0"), vec![in_pod("link del br0")]].concat(),
            ),
            (
                "not in the node's network namespace",
                [vec![in_pod("link add x type veth peer name y")], both("eth0", "x")].concat(),
                [both("x", "eth0"), vec![in_pod("link del x")]].concat(),
            ),
        ];
        for (how, bend, straighten) in bends {
            bend.iter().for_each(|line| run(&format!("ip {line}")));
            let mut told = Vec::new();
            for (pod, plugged) in capture.redirect() {
                match plugged {
                    Ok(()) => assert_eq!(pod, "one", "{how}"),
                    Err(NotRedirected::Cable(why)) => told.push((pod, why.to_string())),
                    Err(other) => panic!("{pod}: {other:?}"),
                }
            }
            let [(pod, why)] = &told[..] else { panic!("{how}: {told:?}") };
            assert!(pod == "two" && why.contains(how), "{pod}: {why}, and not {how}");
            straighten.iter().for_each(|line| run(&format!("ip {line}")));
            let all = PODS.map(|(pod, ..)| pod.to_owned()).to_vec();
            assert_eq!(redirected(&capture), (all, vec![]), "no more: {how}");
        }
        drop(capture);
        Capture::detach(&config.bpffs).unwrap();
    });
}
