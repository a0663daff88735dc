//! Memories and images beside plain vectors: whatever is done to a few guests, each sees its own memory, and every image stays what
//! it was.

use super::*;
use proptest::prelude::*;

const PAGES: u64 = 512;
const BYTES: u64 = PAGES * PAGE_BYTES;

#[derive(Debug, Clone)]
enum Step {
    Write {
        page: u64,
        pages: u64,
        value: u8,
    },
    Discard {
        page: u64,
        pages: u64,
    },
    Zero,
    Freeze,
    /// Freezes it and restores another guest of one of the images.
    Restore(prop::sample::Index),
    /// Puts one of the images into it.
    Remap(prop::sample::Index),
}

fn span() -> impl Strategy<Value = (u64, u64)> {
    // Mostly in a few places, so that steps meet.
    let few = (0..24u64, 1..6u64);
    let many = (0..PAGES, 1..PAGES);
    prop_oneof![6 => few, 1 => many].prop_map(|(page, pages)| (page, pages.min(PAGES - page)))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (span(), 0..4u8).prop_map(|((page, pages), value)| Step::Write { page, pages, value }),
        4 => span().prop_map(|(page, pages)| Step::Discard { page, pages }),
        1 => Just(Step::Zero),
        4 => Just(Step::Freeze),
        2 => any::<prop::sample::Index>().prop_map(Step::Restore),
        1 => any::<prop::sample::Index>().prop_map(Step::Remap),
    ]
}

/// One value for each page, which each of its bytes has.
type Pages = Vec<u8>;

struct Guest {
    memory: GuestMemory,
    pages: Pages,
}

impl Guest {
    fn take(&mut self, step: &Step, images: &mut Vec<(FrozenMemory, Pages)>) -> Option<Self> {
        let place =
            |page: u64, pages: u64| usize::try_from(page).unwrap()..usize::try_from(page + pages).unwrap();
        match *step {
            Step::Write { page, pages, value } => {
                let bytes = vec![value; usize::try_from(pages * PAGE_BYTES).unwrap()];
                self.memory.view().write_slice(&bytes, GuestAddress(page * PAGE_BYTES)).unwrap();
                self.pages[place(page, pages)].fill(value);
            }
            Step::Discard { page, pages } => {
                self.memory.discard(GuestAddress(page * PAGE_BYTES), pages * PAGE_BYTES).unwrap();
                self.pages[place(page, pages)].fill(0);
            }
            Step::Zero => {
                self.memory.zero().unwrap();
                self.pages.fill(0);
            }
            Step::Freeze => {
                let frozen = self.memory.freeze().unwrap().seal().unwrap();
                images.push((frozen, self.pages.clone()));
            }
            Step::Restore(ref which) if !images.is_empty() => {
                let (frozen, pages) = which.get(images);
                return Some(Self { memory: restored(frozen), pages: pages.clone() });
            }
            Step::Remap(ref which) if !images.is_empty() => {
                let (frozen, pages) = which.get(images);
                self.memory.remap(&frozen.image).unwrap();
                self.pages.clone_from(pages);
            }
            Step::Restore(_) | Step::Remap(_) => {}
        }
        None
    }

    /// Both as a dump, which is not to touch anything, and as the guest sees it.
    fn check(&self) -> Result<(), TestCaseError> {
        let mut dumped = vec![0xff; usize::try_from(BYTES).unwrap()];
        self.memory.read(0, &mut dumped).unwrap();
        same(&dumped, &self.pages)?;
        let mut seen = dumped;
        self.memory.view().read_slice(&mut seen, GuestAddress(0)).unwrap();
        same(&seen, &self.pages)
    }
}

fn same(bytes: &[u8], pages: &Pages) -> Result<(), TestCaseError> {
    for (index, (page, value)) in bytes.chunks(4096).zip(pages).enumerate() {
        prop_assert!(page == [*value; 4096], "page {index} has {} in place of {value}", page[0]);
    }
    Ok(())
}

fn restored(frozen: &FrozenMemory) -> GuestMemory {
    GuestMemory::restore(&frozen.image, frozen.bytes, MemoryOptions::default(), None).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn guests_and_images_are_what_the_model_says(
        steps in prop::collection::vec((any::<prop::sample::Index>(), step()), 1..40),
    ) {
        let mut guests = vec![Guest { memory: memory(BYTES), pages: vec![0; 512] }];
        let mut images = Vec::new();
        for (who, step) in steps {
            let which = who.index(guests.len());
            let another = guests[which].take(&step, &mut images);
            guests.extend(another);
        }
        guests.iter().try_for_each(Guest::check)?;
        for (frozen, pages) in &images {
            let mut layers = frozen.image.parts();
            prop_assert!(layers.by_ref().count() <= 2);
            Guest { memory: restored(frozen), pages: pages.clone() }.check()?;
        }
    }
}
