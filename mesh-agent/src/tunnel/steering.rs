//! Two agents at one UDP port: which of them gets a packet.
//!
//! While one agent follows the other both have the port. By itself the kernel chooses between their
//! sockets by the packet's addresses, and so half of all peers would reach the wrong one: an agent that
//! does not know their connection and says so, or one that takes no further connection. So the kernel
//! asks a program (classic BPF, `SO_ATTACH_REUSEPORT_CBPF`), which looks at the connection's id: the first
//! two bytes of an agent's ids are its own ([`Tag`]), and ids that clients make up for their first
//! packets are longer.
//!
//! ```text
//! an agent alone                 all            ─► whoever has bound first: this one
//! a second one has bound         all            ─► whoever has bound first, still
//! the second one carries         its own, new   ─► the second one; all others ─► the first one
//! the first one has ended        all            ─► the second one, which then says so: as above
//! ```
//!
//! # Guarantees
//!
//! - From the moment that a second agent binds until the first one ends, no connection's packets reach the
//!   agent that does not know it.
//! - A program survives both agents' deaths in either order: where it names a socket that is gone, the
//!   kernel takes the one that is left.
//!
//! # Not here
//!
//! A third agent before the first one has ended: then the oldest one's connections are reset, as the
//! kernel does not tell at which place of its list a socket is.

use std::fmt;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::rand;

use crate::net::{self, Instruction};

/// Length of the ids that an agent gives to its connections. Those that clients make up for their first
/// packets have 20 bytes (quinn's default), and eight at least (RFC 9000 section 7.2).
pub(super) const ID_LEN: usize = size_of::<u64>();

/// How often an agent looks whether the one before it has ended.
const LOOK: Duration = Duration::from_secs(1);

/// What the ids of one agent's connections begin with. Random: two agents have the same one once in
/// 65,536 times, and then connections are reset as if there were no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag(pub(super) [u8; 2]);

/// An agent's part in the sharing of its port. Clones are the same part.
#[derive(Clone)]
pub struct Steering {
    socket: Arc<UdpSocket>,
    tag: Tag,
}

impl fmt::Debug for Steering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steering").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Steering {
    /// For a socket that was just bound. Where no other agent has the port, whoever comes later gets
    /// nothing until it says so.
    ///
    /// # Errors
    ///
    /// Fails without randomness or descriptors, or if the kernel takes no program.
    pub fn new(socket: &UdpSocket) -> io::Result<Self> {
        let mut tag = [0; 2];
        rand::fill(&mut tag).map_err(|_unspecified| io::Error::other("no randomness"))?;
        let this = Self { socket: Arc::new(socket.try_clone()?), tag: Tag(tag) };
        this.keep_if_alone()?;
        Ok(this)
    }

    /// What this agent's connection ids begin with.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// From now on this agent gets what is new and what is its own, and the one before it the rest.
    ///
    /// # Errors
    ///
    /// Fails if the kernel takes no program.
    pub fn take_over(&self) -> io::Result<()> {
        let sockets = self.sockets()?;
        if sockets <= 1 {
            return self.attach(&[ret(0)]);
        }
        self.gather(false)?;
        // The kernel's list is in the order of binding, as long as none of it has been closed.
        self.attach(&take_new(self.tag, sockets - 1))
    }

    /// A successor is about to bind.
    ///
    /// # Errors
    ///
    /// Fails if the kernel takes no program.
    pub fn make_room(&self) -> io::Result<()> {
        self.keep_if_alone()?;
        self.gather(false)
    }

    /// Waits until the agent before this one has ended, and takes everything then.
    ///
    /// # Errors
    ///
    /// Fails if the kernel does not tell.
    pub async fn settle(&self) -> io::Result<()> {
        while !self.keep_if_alone()? {
            // quinn turns it on when it takes the socket, which may have been after the last look.
            self.gather(false)?;
            tokio::time::sleep(LOOK).await;
        }
        self.gather(true)
    }

    /// Says whether no other agent has the port.
    fn keep_if_alone(&self) -> io::Result<bool> {
        let alone = self.sockets()? <= 1;
        if alone {
            self.attach(&[ret(0)])?;
        }
        Ok(alone)
    }

    fn sockets(&self) -> io::Result<usize> {
        net::udp_sockets_at(self.socket.local_addr()?.port())
    }

    fn attach(&self, program: &[Instruction]) -> io::Result<()> {
        net::choose_socket_by(self.socket.as_fd(), program)
    }

    /// Whether the kernel may hand over several packets as one: it looks at the first one's id alone, and
    /// packets of one peer's connections to both agents have the same addresses.
    fn gather(&self, on: bool) -> io::Result<()> {
        net::set_udp_gro(self.socket.as_fd(), on)
    }
}

/// The program of whoever is the `own`th in the list of sockets, counted from 0, and not the first.
/// A packet that is too short for a load ends the program with 0 (the kernel's filter.rst), the first.
fn take_new(tag: Tag, own: usize) -> [Instruction; 10] {
    let [own, before] = [own, own - 1].map(|place| u32::try_from(place).unwrap_or(0));
    let tag = u32::from(u16::from_be_bytes(tag.0));
    let id_len = u32::try_from(ID_LEN).unwrap_or(0);
    let (byte, half) =
        (libc::BPF_LD | libc::BPF_ABS | libc::BPF_B, libc::BPF_LD | libc::BPF_ABS | libc::BPF_H);
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let any_bit = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    let always = libc::BPF_JMP | libc::BPF_JA;
    [
        // RFC 8999 section 5: the first bit tells long headers from short ones.
        instruction(byte, 0, 0, 0),
        instruction(any_bit, 0x80, 2, 0),
        // Short: the id follows.
        instruction(half, 1, 0, 0),
        instruction(always, 3, 0, 0),
        // Long: a version, the id's length, the id.
        instruction(byte, 5, 0, 0),
        instruction(equal, id_len, 0, 2),
        instruction(half, 6, 0, 0),
        instruction(equal, tag, 0, 1),
        ret(own),
        ret(before),
    ]
}

fn ret(value: u32) -> Instruction {
    instruction(libc::BPF_RET | libc::BPF_K, value, 0, 0)
}

/// `yes` and `no` are how many instructions a condition skips.
fn instruction(code: u32, k: u32, yes: u8, no: u8) -> Instruction {
    // All codes are below 256.
    Instruction { code: u16::try_from(code).unwrap_or(0), jt: yes, jf: no, k }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv6Addr, SocketAddr};

    use super::*;

    /// An agent's socket, and how it shares its port.
    struct Agent(UdpSocket, Steering);

    fn bind(port: u16) -> Agent {
        let socket = net::udp_socket(SocketAddr::new(net::any_address(), port)).unwrap();
        let steering = Steering::new(&socket).unwrap();
        Agent(socket, steering)
    }

    impl Agent {
        fn port(&self) -> u16 {
            self.0.local_addr().unwrap().port()
        }

        /// All that has come, of what this test has sent: loopback delivers before `send` returns.
        fn got(&self) -> Vec<u8> {
            let mut datagram = [0; 64];
            let mut got = Vec::new();
            while let Ok(len) = self.0.recv(&mut datagram) {
                got.push(datagram[len - 1]);
            }
            got
        }
    }

    /// A packet of a connection with this id, which ends with `mark`.
    fn short(id: &[u8], mark: u8) -> Vec<u8> {
        [&[0x40][..], id, &[0, mark]].concat()
    }

    fn long(id: &[u8], mark: u8) -> Vec<u8> {
        let len = u8::try_from(id.len()).unwrap();
        [&[0xc0, 0, 0, 0, 1, len][..], id, &[0, mark]].concat()
    }

    /// Sends everything from many ports: by their addresses alone packets would come to either.
    fn send(port: u16, packets: &[Vec<u8>]) {
        let to = if net::any_address().is_ipv6() {
            SocketAddr::from((Ipv6Addr::LOCALHOST, port))
        } else {
            SocketAddr::from(([127, 0, 0, 1], port))
        };
        for _ in 0..16 {
            let from = UdpSocket::bind((to.ip(), 0)).unwrap();
            for packet in packets {
                from.send_to(packet, to).unwrap();
            }
        }
    }

    fn id(tag: Tag) -> [u8; ID_LEN] {
        [tag.0[0], tag.0[1], 3, 4, 5, 6, 7, 8]
    }

    #[test]
    fn packets_reach_the_agent_that_knows_their_connection() {
        let old = bind(0);
        let (old_id, strange) = (id(old.1.tag()), [7; 20]);
        let new = bind(old.port());
        let new_id = id(new.1.tag());
        let packets = [
            short(&old_id, 1),
            long(&old_id, 2),
            long(&strange, 3),
            short(&new_id, 4),
            long(&new_id, 5),
            vec![6],
        ];
        send(old.port(), &packets);
        assert_eq!((old.got().len(), new.got()), (96, vec![]), "the new one does not carry yet");

        old.1.make_room().unwrap();
        new.1.take_over().unwrap();
        send(old.port(), &packets);
        assert_eq!(old.got(), [1, 2, 6].repeat(16));
        assert_eq!(new.got(), [3, 4, 5].repeat(16));

        let port = old.port();
        drop(old);
        send(port, &packets);
        assert_eq!(new.got().len(), 96, "nobody else is left");
    }

    #[tokio::test(start_paused = true)]
    async fn agent_that_is_left_alone_shares_with_the_next_one() {
        let first = bind(0);
        let port = first.port();
        let second = bind(port);
        for agent in [&first, &second] {
            net::set_udp_gro(agent.0.as_fd(), true).unwrap();
        }
        first.1.make_room().unwrap();
        second.1.take_over().unwrap();
        assert!(!net::udp_gro(first.0.as_fd()) && !net::udp_gro(second.0.as_fd()));
        drop(first);
        second.1.settle().await.unwrap();
        assert!(net::udp_gro(second.0.as_fd()));
        let third = bind(port);
        let (second_id, third_id) = (id(second.1.tag()), id(third.1.tag()));
        let packets = [short(&second_id, 1), long(&[7; 20], 2), short(&third_id, 3)];
        send(port, &packets);
        assert_eq!((second.got().len(), third.got()), (48, vec![]));
        third.1.take_over().unwrap();
        send(port, &packets);
        assert_eq!((second.got(), third.got()), ([1].repeat(16), [2, 3].repeat(16)));
    }

    #[test]
    fn agent_that_dies_before_the_new_one_carries_leaves_everything_to_it() {
        let old = bind(0);
        let new = bind(old.port());
        let port = old.port();
        drop(old);
        send(port, &[short(&[9; 8], 1), long(&[7; 20], 2)]);
        assert_eq!(new.got(), [1, 2].repeat(16));
    }
}
