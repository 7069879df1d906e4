//! Any text as a process's cgroups: a pod that is found is in it, in every hierarchy that tells of one, and
//! is found again where kubelets put it, whatever its containers call what is below.

use mesh_core::cgroup::{pod_of_name, pod_of_path, pod_of_process};

pub(crate) fn feed(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let paths = || text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    let found = pod_of_process(text);
    match &found {
        Some(uid) => {
            assert!(matches!(uid.len(), 32 | 36), "{uid}");
            let in_a_slice = uid.replace('-', "_");
            let is_in_it = text.contains(uid.as_str()) || text.contains(&in_a_slice);
            assert!(is_in_it, "{uid} is not in it");
            assert!(paths().filter_map(pod_of_path).all(|other| other == *uid), "not only {uid}");
            assert_eq!(pod_of_name(&format!("pod{uid}")), found);
            for class in ["", "burstable-", "besteffort-"] {
                let slice = format!("kubelet-kubepods-{class}pod{in_a_slice}.slice");
                assert_eq!(pod_of_name(&slice), found, "{slice}");
            }
            let below = format!("/kubepods/pod{uid}/{text}");
            assert_eq!(pod_of_path(&below), found, "what is below counts");
        }
        None => {
            let mut pods = paths().filter_map(pod_of_path);
            let first = pods.next();
            let differs = pods.any(|other| Some(&other) != first.as_ref());
            assert!(first.is_none() || differs, "{first:?} was not found");
        }
    }
}
