//! The host's ports: who listens, what is in use, and which pairs have to rest.

use super::connection::End;
use super::packet::PortPair;
use std::collections::{HashMap, HashSet, VecDeque};
use std::task::Waker;
use std::time::{Duration, Instant};

/// The host's ports for its own connections (the dynamic ports of RFC 6335).
pub const EPHEMERAL: std::ops::RangeInclusive<u32> = 49152..=65535;

/// How long a pair that ended uncleanly is refused: packets of the former connection may still be on their way.
pub const QUARANTINE: Duration = Duration::from_secs(10);

/// The most pairs in quarantine; beyond, those that have rested longest are let go. A guest decides how many there are.
const MAX_QUARANTINED: usize = 16 << 10;

/// How many requests of the guest's one listener may leave unanswered; others are refused.
pub(super) const BACKLOG: usize = 128;

/// The most ports on which the host may listen at once.
pub const MAX_LISTENERS: usize = 2048;

/// Why the host cannot listen or connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Somebody listens on the port, or a connection has it.
    #[error("port {0} is in use")]
    AlreadyBound(u32),
    /// Somebody listens on the ports that nobody else listens on.
    #[error("the ports that nobody listens on are in use")]
    AllBound,
    /// [`MAX_LISTENERS`].
    #[error("there are {MAX_LISTENERS} listeners")]
    TooManyListeners,
    /// There are as many connections as there may be, or no ephemeral port is free.
    #[error("there are {connections} connections, and no more ports or room for another")]
    NoResources {
        /// How many connections there are.
        connections: usize,
    },
    /// It was asked, and there was no connection.
    #[error("port {port} of the guest: {end}")]
    NotConnected {
        /// The guest's port.
        port: u32,
        /// Why.
        end: End,
    },
    /// The device is gone, and the guest with it.
    #[error("the guest has ended")]
    Gone,
}

/// Somebody who listens on a port.
#[derive(Debug, Default)]
pub(super) struct Listener {
    /// What the guest has asked for and nobody has taken yet.
    pub(super) backlog: VecDeque<PortPair>,
    pub(super) waker: Option<Waker>,
}

impl Listener {
    pub fn wake(&mut self) {
        self.waker.take().map(Waker::wake).unwrap_or_default();
    }
}

/// Which of the host's ports are in use, by how many connections.
#[derive(Debug)]
pub(super) struct PortsInUse {
    connections: HashMap<u32, usize>,
    ephemeral: std::ops::RangeInclusive<u32>,
    next: u32,
}

impl PortsInUse {
    pub fn new(ephemeral: std::ops::RangeInclusive<u32>) -> Self {
        Self { connections: HashMap::new(), next: *ephemeral.start(), ephemeral }
    }

    pub fn take(&mut self, port: u32) {
        *self.connections.entry(port).or_default() += 1;
    }

    pub fn give_back(&mut self, port: u32) {
        if let Some(count) = self.connections.get_mut(&port) {
            *count -= 1;
            if *count == 0 {
                self.connections.remove(&port);
            }
        }
    }

    pub fn contains(&self, port: u32) -> bool {
        self.connections.contains_key(&port)
    }

    /// An ephemeral port that no connection has and `is_free` agrees to, the one longest unused first.
    pub fn ephemeral(&mut self, is_free: impl Fn(u32) -> bool) -> Option<u32> {
        let (first, last) = (*self.ephemeral.start(), *self.ephemeral.end());
        let mut candidates = (self.next..=last).chain(first..self.next);
        let port = candidates.find(|port| !self.contains(*port) && is_free(*port))?;
        self.next = if port == last { first } else { port + 1 };
        Some(port)
    }
}

/// The pairs that ended uncleanly.
#[derive(Debug, Default)]
pub(super) struct Quarantine {
    /// With when they may be used again, the soonest first.
    order: VecDeque<(Instant, PortPair)>,
    pairs: HashSet<PortPair>,
}

impl Quarantine {
    pub fn add(&mut self, pair: PortPair, now: Instant) {
        self.release(now);
        if self.pairs.insert(pair) {
            self.order.push_back((now + QUARANTINE, pair));
        }
        if self.order.len() > MAX_QUARANTINED {
            self.release_first();
        }
    }

    pub fn contains(&mut self, pair: PortPair, now: Instant) -> bool {
        self.release(now);
        self.pairs.contains(&pair)
    }

    /// Those of now, to be looked at several times.
    pub fn at(&mut self, now: Instant) -> &HashSet<PortPair> {
        self.release(now);
        &self.pairs
    }

    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// The guest has forgotten every connection.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn release(&mut self, now: Instant) {
        while self.order.front().is_some_and(|(until, _)| *until <= now) {
            self.release_first();
        }
    }

    fn release_first(&mut self) {
        if let Some((_, pair)) = self.order.pop_front() {
            self.pairs.remove(&pair);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarantine_ends_by_time_and_is_bounded() {
        let (mut quarantine, start) = (Quarantine::default(), Instant::now());
        let pair = |host| PortPair { guest: 1, host };
        quarantine.add(pair(0), start);
        assert!(quarantine.contains(pair(0), start + QUARANTINE - Duration::from_nanos(1)));
        assert!(!quarantine.contains(pair(0), start + QUARANTINE));
        for port in 0..=u32::try_from(MAX_QUARANTINED).expect("small") {
            quarantine.add(pair(port), start);
        }
        assert_eq!(quarantine.len(), MAX_QUARANTINED);
        assert!(!quarantine.contains(pair(0), start), "the first was let go");
        assert!(quarantine.contains(pair(1), start));
    }

    #[test]
    fn ephemeral_ports_come_in_turn() {
        let mut ports = PortsInUse::new(10..=12);
        let mut next = || {
            let port = ports.ephemeral(|port| port != 11);
            if let Some(port) = port {
                ports.take(port);
            }
            port
        };
        assert_eq!([next(), next(), next()], [Some(10), Some(12), None]);
        ports.give_back(10);
        assert_eq!(ports.ephemeral(|_| true), Some(10));
        assert_eq!(ports.ephemeral(|_| true), Some(11));
    }
}
