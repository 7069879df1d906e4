//! Which pod a process belongs to, from the path of its cgroup.
//!
//! A kubelet puts every process of a pod below a cgroup that is named after the pod's UID, and a
//! process cannot leave it upwards: the path is the kernel's view and not the pod's. What lies deeper a
//! container may name as it likes, so the *first* name from the root that is a pod's counts.
//!
//! Forms that occur (kubelet's `pkg/kubelet/cm/cgroup_manager_linux.go`):
//!
//! | driver | path |
//! |---|---|
//! | cgroupfs | `/kubepods/burstable/pod<UID>/<container>` |
//! | systemd | `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<UID>.slice/cri-containerd-<ID>.scope`, with `_` for `-` in the UID |
//! | CRI-O | the same, then `crio-<ID>.scope/container` |
//! | kind | `/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod<UID>.slice/...` |
//! | another `cgroupRoot` | anything before these |
//! | seen from another cgroup namespace | `/../../..` before these (cgroup_namespaces(7)) |

/// The UID of the pod that a process belongs to, from `/proc/<pid>/cgroup` (proc_pid_cgroup(5)); `None`
/// if it is in no pod, or its hierarchies do not agree.
///
/// ```
/// let text = "1:cpu:/kubepods/podd5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11/3f2a\n\
///             0::/kubepods/podd5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11/3f2a\n";
/// let uid = mesh_core::cgroup::pod_of_process(text);
/// assert_eq!(uid.as_deref(), Some("d5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11"));
/// ```
pub fn pod_of_process(text: &str) -> Option<String> {
    // `hierarchy-ID:controller-list:cgroup-path`; the path may hold colons.
    let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let mut found: Option<String> = None;
    for uid in paths.filter_map(pod_of_path) {
        if found.as_ref().is_some_and(|other| *other != uid) {
            return None;
        }
        found = Some(uid);
    }
    found
}

/// The UID of the pod whose cgroup this is, or is below.
pub fn pod_of_path(path: &str) -> Option<String> {
    path.split('/').find_map(pod_of_name)
}

/// The UID of the pod whose cgroup has this name.
pub fn pod_of_name(name: &str) -> Option<String> {
    if let Some(uid) = name.strip_prefix("pod") {
        return is_uid(uid).then(|| uid.to_owned());
    }
    // `-` separates the slices that a slice lies in, and so is written as `_` inside of a name.
    let slices = name.strip_suffix(".slice")?;
    let uid = slices.rsplit('-').next()?.strip_prefix("pod")?.replace('_', "-");
    (slices.contains("kubepods-") && is_uid(&uid)).then_some(uid)
}

/// A UUID (RFC 9562), or the hash that a static pod has instead.
fn is_uid(text: &str) -> bool {
    let is_hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    if text.len() == 32 {
        return is_hex(text);
    }
    let lengths = text.split('-').map(|part| if is_hex(part) { part.len() } else { 0 });
    lengths.eq([8, 4, 4, 4, 12])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "d5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c11";

    #[test]
    fn every_form_leads_to_the_pod() {
        let systemd = UID.replace('-', "_");
        for path in [
            format!("/kubepods/burstable/pod{UID}/3f2a"),
            format!("/kubepods/pod{UID}/3f2a"),
            format!("/node-1/kubepods/besteffort/pod{UID}/3f2a/deeper"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd}.slice/cri-containerd-3f2a.scope"
            ),
            format!("/kubepods.slice/kubepods-pod{systemd}.slice/crio-3f2a.scope/container"),
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{systemd}.slice/cri-containerd-3f2a.scope"
            ),
            format!("/../../burstable/pod{UID}/3f2a"),
            format!("/system.slice/containerd.service/kubepods/pod{UID}/a:b"),
        ] {
            assert_eq!(pod_of_path(&path).as_deref(), Some(UID), "{path}");
        }
        let hash = "0123456789abcdef0123456789abcdef";
        assert_eq!(pod_of_path(&format!("/kubepods/pod{hash}/x")).as_deref(), Some(hash));
    }

    /// The fuzz target `cgroup` holds the rest.
    #[test]
    fn seeds_of_the_fuzzer_are_of_every_form() {
        for seed in [
            include_str!("../../fuzz/seeds/cgroup/cgroupfs"),
            include_str!("../../fuzz/seeds/cgroup/systemd"),
            include_str!("../../fuzz/seeds/cgroup/crio"),
            include_str!("../../fuzz/seeds/cgroup/kind"),
            include_str!("../../fuzz/seeds/cgroup/hybrid"),
        ] {
            assert_eq!(pod_of_process(seed).as_deref(), Some(UID), "{seed}");
        }
        let hash = "0123456789abcdef0123456789abcdef";
        let seed = include_str!("../../fuzz/seeds/cgroup/static");
        assert_eq!(pod_of_process(seed).as_deref(), Some(hash));
        for seed in [
            include_str!("../../fuzz/seeds/cgroup/torn"),
            include_str!("../../fuzz/seeds/cgroup/none"),
        ] {
            assert_eq!(pod_of_process(seed), None, "{seed}");
        }
    }

    #[test]
    fn what_is_no_pod_is_none() {
        for path in [
            "/",
            "/system.slice/kubelet.service",
            "/kubepods/burstable",
            "/podman/pod1",
            "/kubepods.slice/kubepods-burstable.slice",
            "/user.slice/user-podd5a5c9f2_90d5_43b4_b1b4_2a7a0a1b6c11.slice",
            "/kubepods/podd5a5c9f2-90d5-43b4-b1b4-2a7a0a1b6c1g",
        ] {
            assert_eq!(pod_of_path(path), None, "{path}");
        }
    }

    #[test]
    fn container_cannot_name_itself_into_another_pod() {
        let other = "00000000-90d5-43b4-b1b4-2a7a0a1b6c11";
        let path = format!("/kubepods/pod{UID}/3f2a/kubepods/pod{other}/x");
        assert_eq!(pod_of_path(&path).as_deref(), Some(UID));
        let torn = format!("4:memory:/kubepods/pod{UID}/x\n0::/kubepods/pod{other}/x\n");
        assert_eq!(pod_of_process(&torn), None);
        let partly = format!("4:memory:/\n1:name=systemd:/kubepods/pod{UID}/x\n0::/\n");
        assert_eq!(pod_of_process(&partly).as_deref(), Some(UID));
    }

    proptest! {
        #[test]
        fn whatever_lies_below_changes_nothing(below in "[-a-z0-9_./:]{0,60}") {
            let path = format!("/kubepods/pod{UID}/{below}");
            prop_assert_eq!(pod_of_path(&path), Some(UID.to_owned()));
        }

        #[test]
        fn no_text_panics(text in "(?s).{0,200}") {
            let _any = pod_of_process(&text);
        }
    }
}
