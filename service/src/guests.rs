//! Which guests there are, by id and owner.

use crate::launch::Guest;
use guest_schema::{Failure, GuestError};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::rc::Rc;

/// The longest id, in bytes.
const MAX_ID: usize = 64;

/// The guests of a service, in order of their ids.
#[derive(Default)]
pub(crate) struct Guests(RefCell<BTreeMap<String, Rc<Guest>>>);

impl Guests {
    /// The id to launch under: the one that was asked for, or a new one.
    pub fn choose_id(&self, wanted: &str) -> Result<String, Failure> {
        let guests = self.0.borrow();
        if wanted.is_empty() {
            let ids = std::iter::repeat_with(|| format!("g{:08x}", RandomState::new().hash_one(0) >> 32));
            return Ok(ids.into_iter().find(|id| !guests.contains_key(id)).expect("there are 2^32 ids"));
        }
        let printable = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if wanted.len() > MAX_ID || !wanted.bytes().all(printable) {
            let rule = format!("an id is at most {MAX_ID} letters, digits, '.', '_' and '-'");
            return Err(Failure::new(GuestError::BadConfig, format!("id: {}: {rule}", quoted(wanted))));
        }
        if guests.contains_key(wanted) {
            return Err(Failure::new(
                GuestError::BadConfig,
                format!("id: {wanted:?} is taken by another guest"),
            ));
        }
        Ok(wanted.to_owned())
    }

    /// The guest with exactly this id.
    pub fn get(&self, id: &str) -> Option<Rc<Guest>> {
        self.0.borrow().get(id).cloned()
    }

    pub fn insert(&self, guest: Rc<Guest>) {
        self.0.borrow_mut().insert(guest.id.clone(), guest);
    }

    /// Forgets a guest, whoever does so first; another guest that has its id by now stays.
    pub fn remove(&self, guest: &Rc<Guest>) {
        let mut guests = self.0.borrow_mut();
        if guests.get(&guest.id).is_some_and(|there| Rc::ptr_eq(there, guest)) {
            guests.remove(&guest.id);
        }
    }

    pub fn count(&self) -> usize {
        self.0.borrow().len()
    }

    pub fn all(&self) -> Vec<Rc<Guest>> {
        self.0.borrow().values().cloned().collect()
    }

    /// The guests of one user.
    pub fn of(&self, uid: u32) -> Vec<Rc<Guest>> {
        self.0.borrow().values().filter(|guest| guest.uid == uid).cloned().collect()
    }

    /// The user's guest with this id, or the only one whose id begins so.
    pub fn find(&self, uid: u32, prefix: &str) -> Result<Rc<Guest>, Failure> {
        let own = self.of(uid);
        let begin: Vec<&Rc<Guest>> = own.iter().filter(|guest| guest.id.starts_with(prefix)).collect();
        let found = begin.iter().find(|guest| guest.id == prefix).or(begin.first());
        match (found, begin.len()) {
            (Some(guest), _) if guest.id == prefix || begin.len() == 1 => Ok(Rc::clone(guest)),
            (None, _) => Err(Failure::new(GuestError::BadConfig, format!("id: no guest {}", quoted(prefix)))),
            (Some(_), count) => {
                let ids: Vec<&str> = begin.iter().take(8).map(|guest| &guest.id[..]).collect();
                let detail = format!("id: {prefix:?} begins the ids of {count} guests: {}", ids.join(", "));
                Err(Failure::new(GuestError::BadConfig, detail))
            }
        }
    }
}

/// An id or a name in an answer, which is no longer than an id can be however long the question was.
pub(crate) fn quoted(id: &str) -> String {
    let bytes = id.len();
    match id.char_indices().nth(MAX_ID) {
        Some((end, _)) => format!("{:?}... ({bytes} bytes)", &id[..end]),
        None => format!("{id:?}"),
    }
}
