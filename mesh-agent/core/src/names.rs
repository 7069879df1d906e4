//! What Kubernetes lets its objects be called.

/// Whether it is a subdomain of RFC 1123, as nodes and most other objects are called: lower-case letters, digits and `-`,
/// in parts with `.` between them, 253 characters at most. Nothing in it needs an escape in a path.
pub fn is_subdomain(name: &str) -> bool {
    let is_label = |label: &str| {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        !label.is_empty()
            && label.bytes().all(allowed)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(is_label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_a_subdomain_is_one() {
        let long = "a".repeat(253);
        for name in ["a", "node-1", "ip-10-0-0-1.ec2.internal", "1", &long] {
            assert!(is_subdomain(name), "{name}");
        }
        let too_long = "a".repeat(254);
        for name in ["", ".", "a.", "-a", "a-", "A", "a/b", "..", "a+", "a%2e", "a b", &too_long] {
            assert!(!is_subdomain(name), "{name}");
        }
    }
}
