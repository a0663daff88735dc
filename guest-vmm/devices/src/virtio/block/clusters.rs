//! The sectors of a disk that were written, in memory.
//!
//! Memory is taken by cluster: one of which anything but zeros was written takes all of its 64 KiB, any other that was written some 100
//! bytes, one that was not written nothing. So a disk takes no more than its own size and a five-hundredth of it.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind, Read};
use std::iter::from_fn;
use std::ops::Range;

const SECTOR_BYTES: usize = 512;
/// What is allocated at once, in bytes: as many sectors as there are bits in `present`.
const CLUSTER_BYTES: usize = SECTOR_BYTES * u128::BITS as usize;

static ZEROES: [u8; CLUSTER_BYTES] = [0; CLUSTER_BYTES];

/// Sectors of a disk, by their place. Places are in bytes, multiples of a sector.
#[derive(Default)]
pub(super) struct Clusters(HashMap<u64, Cluster>);

#[derive(Default)]
struct Cluster {
    /// A bit for each sector that was written.
    present: u128,
    /// All zeros if there are none.
    bytes: Option<Box<[u8]>>,
}

/// A part of a disk that is inside a cluster.
struct Piece {
    cluster: u64,
    /// Where in the cluster.
    bytes: Range<usize>,
}

/// What is in the clusters is the guest's own.
impl fmt::Debug for Clusters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clusters").field("count", &self.0.len()).finish_non_exhaustive()
    }
}

impl Clusters {
    /// Writes these places with what is read.
    ///
    /// # Errors
    /// If the host lacks memory, or the reader ends early; a part may have been written.
    pub fn write(&mut self, range: Range<u64>, from: &mut impl Read) -> io::Result<()> {
        for piece in pieces(range) {
            let cluster = self.cluster(piece.cluster)?;
            from.read_exact(&mut cluster.bytes()?[piece.bytes.clone()])?;
            cluster.present |= piece.sectors();
        }
        Ok(())
    }

    /// Makes these places zeros.
    ///
    /// # Errors
    /// If the host lacks memory; a part may have been written.
    pub fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        for piece in pieces(range) {
            let cluster = self.cluster(piece.cluster)?;
            cluster.present |= piece.sectors();
            if piece.is_whole() {
                cluster.bytes = None;
            } else if let Some(bytes) = &mut cluster.bytes {
                bytes[piece.bytes].fill(0);
            }
        }
        Ok(())
    }

    /// Forgets the clusters of which all is in this range.
    pub fn forget(&mut self, range: Range<u64>) {
        for piece in pieces(range).filter(Piece::is_whole) {
            self.0.remove(&piece.cluster);
        }
    }

    /// These places in order: runs that were written, with what is there, and runs that were not. None is longer than a cluster.
    pub fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Option<&[u8]>)> {
        let mut rest = range;
        from_fn(move || {
            let piece = pieces(rest.clone()).next()?;
            let (bytes, data) = self.first_run(&piece);
            let start = rest.start;
            rest.start += bytes as u64;
            Some((start..rest.start, data))
        })
    }

    /// From the first to the last sector in this range that was not written; `None` if all of them were.
    pub fn absent(&self, range: Range<u64>) -> Option<Range<u64>> {
        let mut absent = self.runs(range).filter(|(_, data)| data.is_none()).map(|(run, _)| run);
        let first = absent.next()?;
        let end = absent.last().map_or(first.end, |last| last.end);
        Some(first.start..end)
    }

    fn first_run(&self, piece: &Piece) -> (usize, Option<&[u8]>) {
        let Range { start, end } = piece.bytes;
        let Some(cluster) = self.0.get(&piece.cluster) else { return (end - start, None) };
        let from_here = cluster.present >> (start / SECTOR_BYTES);
        let is_present = from_here & 1 == 1;
        let sectors = if is_present { from_here.trailing_ones() } else { from_here.trailing_zeros() };
        let end = end.min(start + sectors as usize * SECTOR_BYTES);
        let bytes = cluster.bytes.as_deref().unwrap_or(&ZEROES);
        (end - start, is_present.then(|| &bytes[start..end]))
    }

    /// The cluster of this number, to be written.
    fn cluster(&mut self, number: u64) -> io::Result<&mut Cluster> {
        self.0.try_reserve(1).map_err(|_| no_memory())?;
        Ok(self.0.entry(number).or_default())
    }
}

impl Cluster {
    fn bytes(&mut self) -> io::Result<&mut [u8]> {
        if self.bytes.is_none() {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(CLUSTER_BYTES).map_err(|_| no_memory())?;
            bytes.resize(CLUSTER_BYTES, 0);
            self.bytes = Some(bytes.into_boxed_slice());
        }
        Ok(self.bytes.as_deref_mut().unwrap_or_default())
    }
}

fn no_memory() -> io::Error {
    io::Error::new(ErrorKind::OutOfMemory, "the host has no memory for what a guest writes")
}

impl Piece {
    fn is_whole(&self) -> bool {
        self.bytes.len() == CLUSTER_BYTES
    }

    /// Its sectors' bits.
    fn sectors(&self) -> u128 {
        let Range { start, end } = self.bytes;
        let sectors = (end - start) / SECTOR_BYTES;
        (u128::MAX >> (u128::BITS as usize - sectors)) << (start / SECTOR_BYTES)
    }
}

/// A range by cluster, in order.
fn pieces(range: Range<u64>) -> impl Iterator<Item = Piece> {
    let mut rest = range;
    from_fn(move || {
        let (cluster, start) = (rest.start / CLUSTER_BYTES as u64, rest.start % CLUSTER_BYTES as u64);
        let left = rest.end.checked_sub(rest.start).filter(|left| *left > 0)?;
        let length = left.min(CLUSTER_BYTES as u64 - start);
        rest.start += length;
        let place = |at| usize::try_from(at).expect("inside a cluster");
        Some(Piece { cluster, bytes: place(start)..place(start + length) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(clusters: &Clusters, range: Range<u64>) -> Vec<(Range<u64>, Option<u8>)> {
        let first = |(run, data): (Range<u64>, Option<&[u8]>)| {
            assert!(data.is_none_or(|data| data.len() as u64 == run.end - run.start));
            (run.start / 512..run.end / 512, data.map(|data| data[0]))
        };
        clusters.runs(range.start * 512..range.end * 512).map(first).collect()
    }

    fn write(clusters: &mut Clusters, range: Range<u64>, byte: u8) {
        clusters.write(range.start * 512..range.end * 512, &mut io::repeat(byte)).expect("memory");
    }

    #[test]
    fn runs_are_of_one_kind_and_in_one_cluster() {
        let mut clusters = Clusters::default();
        assert_eq!(written(&clusters, 100..200), [(100..128, None), (128..200, None)]);
        write(&mut clusters, 126..129, 7);
        clusters.zero(200 * 512..384 * 512).expect("memory");
        let expected = [
            (0..126, None),
            (126..128, Some(7)),
            (128..129, Some(7)),
            (129..200, None),
            (200..256, Some(0)),
            (256..384, Some(0)),
            (384..400, None),
        ];
        assert_eq!(written(&clusters, 0..400), expected);
        assert_eq!(written(&clusters, 127..128), [(127..128, Some(7))]);
        assert_eq!(clusters.absent(100 * 512..210 * 512), Some(100 * 512..200 * 512));
        assert_eq!(clusters.absent(200 * 512..384 * 512), None);
        assert_eq!(clusters.absent(7..7), None);
    }

    #[test]
    fn zeros_take_no_cluster_and_give_one_back() {
        let mut clusters = Clusters::default();
        let held =
            |clusters: &Clusters| clusters.0.values().filter(|cluster| cluster.bytes.is_some()).count();
        clusters.zero(0..1 << 30).expect("memory");
        assert_eq!((clusters.0.len(), held(&clusters)), (1 << 14, 0));
        write(&mut clusters, 1..2, 9);
        assert_eq!(held(&clusters), 1);
        assert_eq!(written(&clusters, 0..3), [(0..3, Some(0))], "one run, whose second sector is");
        let whole = clusters.runs(0..1536).next().and_then(|(_, data)| data).expect("data");
        assert!(whole[512..1024] == [9; 512] && whole[1024..] == [0; 512]);
        clusters.zero(512..1024).expect("memory");
        assert_eq!(held(&clusters), 1, "only a part was zeroed");
        clusters.zero(0..CLUSTER_BYTES as u64).expect("memory");
        assert_eq!(held(&clusters), 0);
    }

    #[test]
    fn whole_clusters_are_forgotten() {
        let mut clusters = Clusters::default();
        write(&mut clusters, 0..384, 1);
        clusters.forget(512..384 * 512);
        assert_eq!(clusters.0.len(), 1);
        assert_eq!(written(&clusters, 0..300), [(0..128, Some(1)), (128..256, None), (256..300, None)]);
    }

    #[test]
    fn a_reader_that_ends_early_is_an_error() {
        let mut clusters = Clusters::default();
        let error = clusters.write(0..1024, &mut &[1; 1000][..]).expect_err("too short");
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        assert_eq!(clusters.absent(0..1024), Some(0..1024), "it counts as not written");
    }
}
