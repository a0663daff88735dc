//! Snapshots that the service keeps for others: files that a VMM hands over, and what they are of.
//!
//! The files are sealed memfds, which are passed on and never mapped, and read for an export alone. The memory may also be a file that
//! its user keeps on disk, by a descriptor that nothing is written by. A snapshot lasts for as long as a capability to it does; there is no list of them. Limits: one service's memory; nothing of them outlives it.

use crate::guests::quoted;
use guest_schema::vmm_capnp::{snapshot_file, snapshot_parts};
use guest_schema::{Failure, GuestError, SnapshotFile, SnapshotInfo};
use guest_snapshot_file::SnapshotSource;
use guest_transport::Descriptors;
use rustix::fs::{FileType, OFlags, SealFlags};
use rustix::rand::GetRandomFlags;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;

/// What a snapshot is found by.
type Token = [u8; 16];

/// The files of a snapshot.
type Files = BTreeMap<SnapshotFile, Arc<File>>;

/// The largest info of a snapshot, in words of 8 bytes: what it says is kept for as long as the snapshot.
const MAX_INFO_WORDS: u64 = 8 << 10;

/// What nobody may do any more to a file of a snapshot.
const SEALS: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

/// Which snapshots there are.
pub(crate) struct Snapshots {
    most: usize,
    kept: RefCell<HashMap<Token, Weak<Kept>>>,
}

impl Snapshots {
    /// Room for so many.
    pub fn new(most: usize) -> Rc<Self> {
        Rc::new(Self { most, kept: RefCell::default() })
    }

    /// Keeps a snapshot of the guest `parent` of this user: `badConfig` unless its files and its info are what those of a snapshot
    /// are, `limitExceeded` if there are too many. The files that it names are taken from the channel, and closed if it is refused.
    pub fn keep(
        self: &Rc<Self>,
        parts: snapshot_parts::Reader<'_>,
        descriptors: &Descriptors,
        uid: u32,
        parent: &str,
    ) -> capnp::Result<Result<Rc<Kept>, Failure>> {
        let files = match take_files(parts.get_files()?, descriptors)? {
            Ok(files) => files,
            Err(failure) => return Ok(Err(failure)),
        };
        let info = parts.get_info()?;
        if info.total_size()?.word_count > MAX_INFO_WORDS {
            return Ok(bad(format!("info: it is of more than {} KiB", MAX_INFO_WORDS * 8 / 1024)));
        }
        // Whose it is, the service knows best.
        let info = SnapshotInfo { parent: parent.to_owned(), ..SnapshotInfo::read(info)? };
        Ok(self.admit(files, info, uid))
    }

    fn admit(self: &Rc<Self>, files: Files, info: SnapshotInfo, uid: u32) -> Result<Rc<Kept>, Failure> {
        check(&files)?;
        let mut all = self.kept.borrow_mut();
        if all.len() >= self.most {
            let detail = format!("the service's limit of {} snapshots is reached", self.most);
            return Err(Failure::new(GuestError::LimitExceeded, detail));
        }
        let token = new_token()?;
        let kept = Rc::new(Kept { token, uid, info, files, among: Rc::downgrade(self) });
        all.insert(token, Rc::downgrade(&kept));
        Ok(kept)
    }

    /// The user's snapshot with this token: `badConfig` if there is none.
    pub fn find(&self, uid: u32, token: &[u8]) -> Result<Rc<Kept>, Failure> {
        let all = self.kept.borrow();
        let found = Token::try_from(token).ok().and_then(|token| all.get(&token)?.upgrade());
        found.filter(|kept| kept.uid == uid).map_or_else(|| bad("token: no snapshot has it".into()), Ok)
    }
}

fn bad<T>(detail: String) -> Result<T, Failure> {
    Err(Failure::new(GuestError::BadConfig, detail))
}

/// Takes the files that are named from the channel.
fn take_files(
    list: capnp::struct_list::Reader<'_, snapshot_file::Owned>,
    descriptors: &Descriptors,
) -> capnp::Result<Result<Files, Failure>> {
    // All before any is found wanting, so that none is left waiting on the channel.
    let taken =
        list.iter().map(|file| Ok((file.get_name()?.to_string()?, descriptors.take(file.get_descriptor()))));
    let taken: Vec<_> = taken.collect::<capnp::Result<_>>()?;
    let most = SnapshotFile::ALL.len();
    if taken.len() > most {
        return Ok(bad(format!("files: {} are more than the {most} that there can be", taken.len())));
    }
    let mut files = Files::new();
    for (index, (name, descriptor)) in taken.into_iter().enumerate() {
        let Some(file) = SnapshotFile::named(&name) else {
            return Ok(bad(format!("files[{index}].name: {} is none of a snapshot's files", quoted(&name))));
        };
        match descriptor {
            Err(error) => return Ok(bad(format!("files[{index}].descriptor: {name}: {error}"))),
            Ok(_) if files.contains_key(&file) => {
                return Ok(bad(format!("files[{index}].name: {name} is there twice")));
            }
            Ok(descriptor) => drop(files.insert(file, Arc::new(File::from(descriptor)))),
        }
    }
    Ok(Ok(files))
}

/// Whether these are the files of a snapshot that nobody can change.
fn check(files: &Files) -> Result<(), Failure> {
    if let Some(missing) =
        SnapshotFile::ALL.iter().find(|file| file.is_required() && !files.contains_key(file))
    {
        return bad(format!("files: {} is missing", missing.name()));
    }
    for (file, descriptor) in files {
        let name = file.name();
        if *file == SnapshotFile::Memory && is_on_disk(descriptor) {
            continue;
        }
        let Ok(seals) = rustix::fs::fcntl_get_seals(&**descriptor) else {
            return bad(format!("files: {name} is no memfd"));
        };
        if !seals.contains(SEALS) {
            return bad(format!(
                "files: {name} is not sealed against writes, shrinking and growing, but {seals:?}"
            ));
        }
    }
    Ok(())
}

/// Whether it is a file that whoever holds this descriptor cannot write to: the memory of a guest that goes on from a snapshot's file is
/// that file, which its user keeps.
fn is_on_disk(descriptor: &File) -> bool {
    let is_file = rustix::fs::fstat(descriptor)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    let flags = rustix::fs::fcntl_getfl(descriptor).unwrap_or(OFlags::PATH);
    is_file && !flags.contains(OFlags::PATH) && flags & OFlags::RWMODE == OFlags::RDONLY
}

fn new_token() -> Result<Token, Failure> {
    let mut token = Token::default();
    // Up to 256 bytes come whole (getrandom(2)).
    match rustix::rand::getrandom(&mut token, GetRandomFlags::empty()) {
        Ok(length) if length == token.len() => Ok(token),
        other => Err(Failure::new(GuestError::InternalError, format!("no random token: {other:?}"))),
    }
}

/// A snapshot. Its files are closed when the last that refers to it is gone.
pub(crate) struct Kept {
    pub token: Token,
    pub info: SnapshotInfo,
    uid: u32,
    files: Files,
    among: Weak<Snapshots>,
}

impl Kept {
    /// What its file is made of.
    pub fn source(&self) -> SnapshotSource {
        SnapshotSource { files: self.files.clone(), info: self.info.clone() }
    }

    /// Descriptors of all its files for somebody else.
    pub fn duplicate(&self) -> std::io::Result<Duplicates<'_>> {
        let duplicate =
            |(name, file): (&SnapshotFile, &Arc<File>)| Ok((*name, OwnedFd::from(file.try_clone()?)));
        let files = self.files.iter().map(duplicate).collect::<std::io::Result<_>>()?;
        Ok(Duplicates { info: &self.info, files })
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(among) = self.among.upgrade() {
            among.kept.borrow_mut().remove(&self.token);
        }
        tracing::debug!(guest = self.info.parent, "a snapshot is freed");
    }
}

/// A snapshot's parts on their way to a VMM or a client.
pub(crate) struct Duplicates<'a> {
    info: &'a SnapshotInfo,
    files: Vec<(SnapshotFile, OwnedFd)>,
}

impl Duplicates<'_> {
    /// Hands them over a channel, with the message that is sent next.
    pub fn write(self, descriptors: &Descriptors, mut parts: snapshot_parts::Builder<'_>) {
        let count = u32::try_from(self.files.len()).expect("there are few");
        let mut list = parts.reborrow().init_files(count);
        for (index, (file, descriptor)) in (0..count).zip(self.files) {
            let mut entry = list.reborrow().get(index);
            entry.set_name(file.name());
            entry.set_descriptor(descriptors.push(descriptor));
        }
        self.info.write(parts.init_info());
    }
}
