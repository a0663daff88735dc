//! The host's CPUs on which a thread may run: sched_setaffinity(2).
//!
//! Limit: CPUs from number 1024 on cannot be named, and a host that has them does not say where a thread may run.

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};
use std::collections::BTreeSet;
use std::fmt;
use std::io;

/// A set of the host's CPUs, by their numbers in /proc/cpuinfo. Shown as the kernel shows such sets: `0-3,6`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostCpus(BTreeSet<u32>);

impl HostCpus {
    /// Those on which the calling thread may run: its own affinity, and what its cpuset allows.
    ///
    /// # Errors
    /// The host has more CPUs than a set can hold.
    pub fn of_this_thread() -> io::Result<Self> {
        Self::of_thread(None)
    }

    pub(super) fn of_thread(thread: Option<Pid>) -> io::Result<Self> {
        let set = sched_getaffinity(thread)?;
        Ok((0u32..).take(CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu as usize)).collect())
    }

    /// Keeps the calling thread on these CPUs. Those that its cpuset does not allow are left out.
    ///
    /// # Errors
    /// None of them is left, or one has a number that no set can hold.
    pub(super) fn bind_this_thread(&self) -> io::Result<()> {
        let mut set = CpuSet::new();
        for cpu in &self.0 {
            let cpu = *cpu as usize;
            if cpu >= CpuSet::MAX_CPU {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            set.set(cpu);
        }
        Ok(sched_setaffinity(None, &set)?)
    }

    /// Whether it is one of them.
    pub fn contains(&self, cpu: u32) -> bool {
        self.0.contains(&cpu)
    }

    /// Their numbers, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().copied()
    }
}

impl FromIterator<u32> for HostCpus {
    fn from_iter<I: IntoIterator<Item = u32>>(cpus: I) -> Self {
        Self(cpus.into_iter().collect())
    }
}

impl fmt::Display for HostCpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut cpus = self.iter().peekable();
        let mut separator = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if(|next| last.checked_add(1) == Some(*next)) {
                last = next;
            }
            write!(f, "{separator}{first}")?;
            if last != first {
                write!(f, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_reads_as_the_kernel_writes_it() {
        for (cpus, text) in [
            (&[][..], ""),
            (&[7], "7"),
            (&[1, 0], "0-1"),
            (&[9, 0, 1, 2, 4, 6, 7], "0-2,4,6-7,9"),
            (&[u32::MAX, u32::MAX - 1], "4294967294-4294967295"),
        ] {
            assert_eq!(cpus.iter().copied().collect::<HostCpus>().to_string(), text);
        }
    }

    #[test]
    fn a_thread_stays_where_it_is_bound() {
        let thread = std::thread::spawn(|| {
            let last = HostCpus::of_this_thread().unwrap().iter().last().unwrap();
            let one: HostCpus = [last].into_iter().collect();
            one.bind_this_thread().unwrap();
            assert_eq!(HostCpus::of_this_thread().unwrap(), one);
            assert_eq!(rustix::thread::sched_getcpu(), last as usize);
            for nowhere in [HostCpus::default(), [1023].into_iter().collect(), [1024].into_iter().collect()] {
                let error = nowhere.bind_this_thread().unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{nowhere}: {error}");
            }
            assert_eq!(HostCpus::of_this_thread().unwrap(), one, "a refusal changes nothing");
        });
        thread.join().unwrap();
    }
}
