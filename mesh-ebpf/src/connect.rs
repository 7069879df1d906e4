//! `cgroup/connect4` and `connect6`: send an enrolled pod's outbound TCP to its agent's listener, or
//! straight to an endpoint on this node that the agent has allowed before ([`crate::direct`]).
//!
//! An `AF_INET6` socket that dials `::ffff:a.b.c.d` runs `connect6` alone and is sent to the
//! v4-mapped form of the pod's IPv4 address.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock_addr};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_netns_cookie,
    bpf_map_lookup_elem, bpf_set_retval, bpf_sk_storage_get, bpf_skc_to_mptcp_sock,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::SockAddrContext;
use mesh_common::addr::is_v4;
use mesh_common::maps::{
    PodOutbound, ROLE_AGENT, ROLE_APP, ROLE_DELIVER, ROLE_PLAIN, SkipCidr, SockMeta,
};
use mesh_common::pending::{self, decide_pending};
use mesh_common::verdict::{Block, Connect, decide_connect, is_kubelet};
use mesh_common::{Counter, WireAddr};

use crate::context::{IPPROTO_TCP, dst4, dst6, read, set4, set6};
use crate::direct::{self, Client, Way, way};
use crate::maps::{
    CONTROL, DESTINATIONS, NETWORKS, PENDING, POD_OUTBOUND, SKIP_CIDRS, SOCK_META, agent, count,
    is_pod, now_ns,
};

const ALLOW: i32 = 1;
/// `connect()` fails with `EPERM`.
const DENY: i32 = 0;

/// Bits of a whole address.
const ADDRESS_BITS: u32 = 128;
/// Bits of a netns cookie and a whole address.
const FULL_PREFIX: u32 = SkipCidr::NETNS_BITS + ADDRESS_BITS;

#[cgroup_sock_addr(connect4)]
pub fn mesh_connect4(ctx: SockAddrContext) -> i32 {
    capture(&ctx, dst4, set4)
}

#[cgroup_sock_addr(connect6)]
pub fn mesh_connect6(ctx: SockAddrContext) -> i32 {
    capture(&ctx, dst6, set6)
}

#[inline(always)]
fn capture(
    ctx: &SockAddrContext,
    dst: impl FnOnce(*const bpf_sock_addr) -> WireAddr,
    redirect: impl FnOnce(*mut bpf_sock_addr, &WireAddr),
) -> i32 {
    // An MPTCP socket arrives here as its first subflow, which is TCP.
    if read!(ctx.sock_addr, protocol) != IPPROTO_TCP {
        return ALLOW;
    }
    // SAFETY: the context is a `bpf_sock_addr` with a full socket; without `CREATE` the helper returns
    // this socket's storage, which lives as long as the socket, or null.
    let meta = unsafe { SOCK_META.get_ptr_mut(ctx) };
    if !meta.is_null() {
        // SAFETY: not null; see above. Only this socket's owner and this program write it.
        let meta = unsafe { &mut *meta };
        if meta.role == ROLE_AGENT || meta.role == ROLE_DELIVER {
            count(Counter::ConnectAgent);
            return ALLOW;
        }
        // The socket may be used a second time, `connect(AF_UNSPEC)` in between.
        meta.role = ROLE_APP;
        meta.captured = 0;
    }

    // SAFETY: the helper only reads the context.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let dst = dst(ctx.sock_addr);
    // Nobody is taken for no pod by one look, and what changed under it is decided anew: see `POD_OUTBOUND`.
    let seen = match look(netns, &dst, false) {
        // The second look comes last: the agent writes a pod's entry before it takes it from those that are
        // pending.
        Seen::Nothing if of_no_pod(ctx, netns, &dst) == DENY => return DENY,
        Seen::Nothing => look(netns, &dst, false),
        Seen::Changed => look(netns, &dst, true),
        decided => decided,
    };
    let (slot, client, verdict) = match seen {
        Seen::Decided(slot, client, verdict) => (slot, client, verdict),
        Seen::Changed => {
            count(Counter::ConnectChanged);
            return DENY;
        }
        Seen::Nothing => return ALLOW,
    };
    let listener = match verdict {
        Connect::Pass(reason) => {
            count(reason);
            if matches!(reason, Counter::ConnectSkippedPort | Counter::ConnectSkippedCidr) {
                keep_apart(ctx, &dst);
            }
            return ALLOW;
        }
        Connect::Deny(reason) => {
            count(reason);
            return DENY;
        }
        Connect::FailOpen => None,
        Connect::Capture { ip, port } => Some(WireAddr::new(ip, port)),
    };
    let mut meta = SockMeta { orig: dst, captured: 1, ..SockMeta::of(ROLE_APP) };
    let to = match (way(ctx, netns, &client, &dst), listener) {
        (Way::Direct(endpoint, server), _) => {
            direct::remember(&mut meta, &client, endpoint, server);
            endpoint
        }
        (Way::Agent(endpoint), Some(listener)) => {
            // The kernel gives a connection any port that nobody has. Of an agent that is gone it may be the very
            // one that this goes to, and TCP connects it to itself (simultaneous open, RFC 9293 section 3.5): the
            // application would read what it has written.
            if !direct::is_there(ctx, &listener) {
                count(Counter::ConnectNoListener);
                return refuse();
            }
            meta.endpoint = endpoint;
            listener
        }
        (Way::Agent(_), None) => {
            count(Counter::ConnectFailOpen);
            keep_apart(ctx, &dst);
            return ALLOW;
        }
    };
    // Remember before rewriting: who accepts without it cannot know the destination.
    if !remember(ctx, &mut meta) {
        count(Counter::ConnectNoStorage);
        return DENY;
    }
    remember_on_mptcp(ctx, &mut meta);
    redirect(ctx.sock_addr, &to);
    if meta.role == ROLE_APP {
        // SAFETY: RCU keeps the element mapped for this call. Not atomic, and it may be another pod's by now: see
        // `PodOutbound::turn`.
        unsafe { (*slot).turn = (*slot).turn.wrapping_add(1) };
        count(Counter::Captured);
    }
    ALLOW
}

/// What a look at a pod's entry came to.
enum Seen {
    /// There is none.
    Nothing,
    /// It was written or removed meanwhile.
    Changed,
    /// Itself, who it is of, and what it says.
    Decided(*mut PodOutbound, Client, Connect),
}

/// Decides over a connection to `dst` of the pod in this namespace, which has an entry for sure if it `has_one`, or
/// has just left.
#[inline(always)]
fn look(netns: u64, dst: &WireAddr, has_one: bool) -> Seen {
    let again = || if has_one { POD_OUTBOUND.get_ptr_mut(netns) } else { None };
    let Some(slot) = POD_OUTBOUND.get_ptr_mut(netns).or_else(again) else {
        return Seen::Nothing;
    };
    // SAFETY: RCU keeps the element mapped for this call; see `POD_OUTBOUND` for why it is not copied.
    let pod = unsafe { &*slot };
    // SAFETY: as above. Volatile: read now, whatever is read of it later.
    let written = unsafe { core::ptr::read_volatile(&raw const (*slot).written) };
    let is_skipped = || {
        let key = Key::new(FULL_PREFIX, SkipCidr::new(netns, dst.ip));
        // 0: a block that is captured inside of a larger one that is not.
        SKIP_CIDRS.get(key).is_some_and(|skipped| *skipped != 0)
    };
    let verdict = decide_connect(pod, dst, || is_mesh(dst), is_skipped, agent);
    let client = Client::of(pod, is_v4(&dst.ip));
    let is_still = POD_OUTBOUND.get_ptr(netns).is_some_and(|now| {
        // SAFETY: as above.
        let now = unsafe { core::ptr::read_volatile(&raw const (*now).written) };
        now == written
    });
    if is_still { Seen::Decided(slot, client, verdict) } else { Seen::Changed }
}

/// Decides over a process in a namespace that is no enrolled pod's.
#[inline(always)]
fn of_no_pod(ctx: &SockAddrContext, netns: u64, dst: &WireAddr) -> i32 {
    // An array of one element has its element: `None` is for the verifier.
    let Some(control) = CONTROL.get(0) else { return ALLOW };
    // What shares the node's namespace is no pod that could be captured.
    if control.pending != 0 && netns != control.node_netns {
        return while_pending(dst);
    }
    // SAFETY: the helper has no arguments; 0 is no kubelet's.
    if is_kubelet(control, netns, || unsafe { bpf_get_current_cgroup_id() }) {
        let_in(ctx, dst);
    }
    ALLOW
}

/// Notes what `sock_ops` is to know of this socket.
#[inline(always)]
fn remember(ctx: &SockAddrContext, meta: &mut SockMeta) -> bool {
    // SAFETY: as for the lookup in `capture`; `meta` outlives the call, which copies it.
    let stored = unsafe { SOCK_META.get_or_insert_ptr_mut(ctx, Some(meta)) };
    if stored.is_null() {
        return false;
    }
    // SAFETY: not null; this socket's storage. It may have existed before, with an older value.
    unsafe { *stored = *meta };
    true
}

/// Has `sock_ops` say that this connection is no direct one, if it goes to a pod of this node: the source
/// pod's direct connections to there may come from any port for a while.
///
/// Fails open: without memory it may be taken for one of those, and passes unrecorded.
#[inline(always)]
fn keep_apart(ctx: &SockAddrContext, dst: &WireAddr) {
    if is_pod(&dst.ip) {
        let _fails_open = remember(ctx, &mut SockMeta::of(ROLE_PLAIN));
    }
}

/// Whether the mesh is, or may be, at this address.
#[inline(always)]
fn is_mesh(dst: &WireAddr) -> bool {
    // Twice: see `POD_OUTBOUND`. The second time last: an address becomes a destination before its block is
    // read.
    let is_destination = || DESTINATIONS.get_ptr(dst.ip).is_some();
    is_destination() || is_unread(dst) || is_destination()
}

/// Whether it is in a block where somebody may be of whom nobody knows yet.
#[inline(always)]
fn is_unread(dst: &WireAddr) -> bool {
    let key = Key::new(ADDRESS_BITS, dst.ip);
    // The static's address is what the loader replaces with the map.
    let map = (&raw const NETWORKS).cast_mut();
    // SAFETY: the map's keys are such; the helper only reads it. Not by the map's own `get`, which gives
    // no pointer to write to.
    let value = unsafe { bpf_map_lookup_elem(map.cast(), (&raw const key).cast()) }.cast::<u32>();
    if value.is_null() {
        return false;
    }
    // SAFETY: not null; the map's values are `u32`, and a trie frees its elements after a grace period of
    // RCU, so this one stays what it is for this call.
    match Block::of(unsafe { value.read_volatile() }) {
        Block::Unread => true,
        Block::LeftAlone(None) => false,
        Block::LeftAlone(Some(used)) => {
            // SAFETY: as above. Who changes a block replaces its element, so this never says of another kind
            // of block that it is left alone.
            unsafe { value.write_volatile(used) };
            false
        }
    }
}

/// Decides over a process that is in no enrolled pod, while there are pods that are not captured yet: it
/// is one of theirs if one of the cgroups that it lies in is.
#[inline(always)]
fn while_pending(dst: &WireAddr) -> i32 {
    for level in 1..=pending::DEEPEST {
        // SAFETY: the helper only reads the current task.
        let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if cgroup == 0 {
            return ALLOW; // Its own was the level before.
        }
        // Twice: see `POD_OUTBOUND`.
        let found = PENDING.get_ptr(cgroup).or_else(|| PENDING.get_ptr(cgroup));
        let Some(pod) = found else { continue };
        // SAFETY: RCU keeps the element mapped for this call. One that is recycled meanwhile is another
        // pending pod's. If this one has been enrolled, `capture` looks for its entry after this; if it was
        // held back otherwise (the agent writes what changes), the worst outcome is one connection by the
        // other one's settings.
        let pod = unsafe { &*pod };
        return match decide_pending(pod, dst, now_ns(), || is_mesh(dst), agent) {
            Connect::Deny(reason) => {
                count(reason);
                refuse()
            }
            Connect::Pass(reason) => {
                count(reason);
                ALLOW
            }
            // Nothing that is pending has listeners or verdicts.
            Connect::Capture { .. } | Connect::FailOpen => ALLOW,
        };
    }
    ALLOW
}

/// Whether the kernel has `bpf_set_retval` for this hook (Linux 6.1), as [`HAS_MPTCP`].
#[unsafe(no_mangle)]
static HAS_RETVAL: u8 = 0;

/// `ECONNREFUSED`, which applications take for "not yet" and try again; without `bpf_set_retval` it is
/// `EPERM`.
#[inline(always)]
fn refuse() -> i32 {
    const ECONNREFUSED: i32 = 111;
    // SAFETY: a constant of this object; volatile, since the loader changes it after compilation.
    if unsafe { core::ptr::read_volatile(&raw const HAS_RETVAL) } != 0 {
        // SAFETY: the helper only writes what the system call returns. It cannot fail with an errno.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    DENY
}

/// Has `sock_ops` announce the kubelet's connection to an enrolled pod as it does a delivery of the agent:
/// a probe asks the application, in whatever mode the pod is, and costs the agent nothing.
///
/// Fails closed: at worst the pod takes it for plain text of a stranger.
#[inline(always)]
fn let_in(ctx: &SockAddrContext, dst: &WireAddr) {
    if !is_pod(&dst.ip) {
        return;
    }
    let mut meta = SockMeta::of(ROLE_DELIVER);
    // SAFETY: as in `capture`; `meta` outlives the call, which copies it.
    let stored = unsafe { SOCK_META.get_or_insert_ptr_mut(ctx, Some(&mut meta)) };
    if !stored.is_null() {
        count(Counter::ConnectKubelet);
    }
}

/// Whether the kernel has `bpf_skc_to_mptcp_sock` (Linux 5.19, with BTF). The loader says so before the
/// verifier sees the program, which then never looks at the call where it cannot be made.
#[unsafe(no_mangle)]
static HAS_MPTCP: u8 = 0;

/// `getpeername` of an MPTCP socket asks that socket, and not the subflow that `connect` saw.
///
/// Fails open: at worst the application sees the listener.
#[inline(always)]
fn remember_on_mptcp(ctx: &SockAddrContext, meta: &mut SockMeta) {
    // SAFETY: a constant of this object; volatile, since the loader changes it after compilation.
    if unsafe { core::ptr::read_volatile(&raw const HAS_MPTCP) } == 0 {
        return;
    }
    let subflow = read!(ctx.sock_addr, __bindgen_anon_1.sk);
    // SAFETY: the context's own socket; null comes back for one that is no MPTCP subflow.
    let whole = unsafe { bpf_skc_to_mptcp_sock(subflow.cast()) };
    if whole.is_null() {
        return;
    }
    // The static's address is what the loader replaces with the map.
    let map = (&raw const SOCK_META).cast_mut();
    let value = core::ptr::from_mut(meta);
    // SAFETY: not null; the helper copies `meta` into new storage.
    let stored = unsafe {
        bpf_sk_storage_get(
            map.cast(),
            whole.cast(),
            value.cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
    };
    if !stored.is_null() {
        // SAFETY: not null; the map's values are `SockMeta`. It may have existed, with an older value.
        unsafe { *stored.cast::<SockMeta>() = *meta };
    }
}
