//! Images: what memory is restored from, and which descriptors are refused.

use super::*;
use rustix::fs::{MemfdFlags, memfd_create};
use std::io::Write;

fn restore(image: &MemoryImage) -> Result<GuestMemory, RestoreMemoryError> {
    GuestMemory::restore(image, 2 * MIB, MemoryOptions::default(), None)
}

fn image() -> MemoryImage {
    let memory = memory(2 * MIB);
    memory.view().write_obj(1u8, GuestAddress(MIB)).unwrap();
    memory.freeze().unwrap().seal().unwrap();
    memory.view().write_obj(2u8, GuestAddress(0)).unwrap();
    memory.freeze().unwrap().seal().unwrap().image
}

fn memfd(bytes: u64, seals: SealFlags) -> Arc<File> {
    let file = memfd_create("image", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    Arc::new(file.into())
}

fn bytes(memory: &GuestMemory) -> [u8; 2] {
    [0, MIB].map(|at| memory.view().read_obj(GuestAddress(at)).unwrap())
}

#[test]
fn only_sealed_files_are_taken_for_sealed() {
    let sealed =
        |seals| ImageFile::sealed(memfd(2 * MIB, seals)).map(drop).map_err(|error| error.to_string());
    assert_eq!(sealed(SealFlags::WRITE | SealFlags::SHRINK), Ok(()));
    for (seals, missing) in [
        (SealFlags::SHRINK, "F_SEAL_WRITE"),
        (SealFlags::WRITE, "F_SEAL_SHRINK"),
        (SealFlags::FUTURE_WRITE | SealFlags::SHRINK, "F_SEAL_WRITE"),
        (SealFlags::empty(), "F_SEAL_WRITE and F_SEAL_SHRINK"),
    ] {
        assert_eq!(sealed(seals), Err(format!("is not sealed: {missing} is missing")));
    }
    let disk = Arc::new(tempfile::tempfile().unwrap());
    assert!(matches!(ImageFile::sealed(disk), Err(ImageError::NotSealed { .. })));
}

#[test]
fn what_is_no_file_to_read_is_refused() {
    let folder = || Arc::new(File::open("/").unwrap());
    let null = || Arc::new(File::options().read(true).write(true).open("/dev/null").unwrap());
    for file in [folder(), null()] {
        assert!(matches!(ImageFile::on_disk(file.clone()), Err(ImageError::NotAFile)));
        assert!(matches!(ImageFile::sealed(file), Err(ImageError::NotAFile)));
    }
    let path = tempfile::NamedTempFile::new().unwrap();
    let write_only = Arc::new(File::options().write(true).open(path.path()).unwrap());
    assert!(matches!(ImageFile::on_disk(write_only), Err(ImageError::NotReadable)));
}

#[test]
fn files_of_another_size_are_refused_by_the_part_they_are() {
    let seals = SealFlags::WRITE | SealFlags::SHRINK;
    let of = |bytes| ImageFile::sealed(memfd(bytes, seals)).unwrap();
    let MemoryImage { base, layer } = image();
    for bytes in [0, 2 * MIB - 4096, 2 * MIB + 4096] {
        let wrong_base = MemoryImage { base: of(bytes), layer: layer.clone() };
        let wrong_layer = MemoryImage { base: base.clone(), layer: Some(of(bytes)) };
        for (image, part) in [(wrong_base, "base"), (wrong_layer, "layer")] {
            let text = format!("the memory image's {part} has {bytes} bytes, but the memory has 2097152");
            assert_eq!(restore(&image).unwrap_err().to_string(), text);
            let warm = memory(2 * MIB);
            warm.view().write_obj(7u8, GuestAddress(0)).unwrap();
            assert_eq!(warm.remap(&image).unwrap_err().to_string(), text);
            assert_eq!((bytes_of_first(&warm), warm.is_private()), (7, false), "nothing has changed");
        }
    }
}

fn bytes_of_first(memory: &GuestMemory) -> u8 {
    bytes(memory)[0]
}

#[test]
fn an_image_is_put_into_memory_that_is_there() {
    let warm = memory(2 * MIB);
    let (address, own) = (warm.host_address(), Arc::downgrade(&warm.file()));
    let view = warm.view().clone();
    warm.remap(&image()).unwrap();
    assert!(own.upgrade().is_none(), "what it had is given back");
    assert_eq!((bytes(&warm), warm.host_address()), ([2, 1], address));
    assert_eq!(view.read_obj::<u8>(GuestAddress(MIB)).unwrap(), 1);
    drop(view);
    warm.view().write_obj(3u8, GuestAddress(MIB)).unwrap();
    let frozen = warm.freeze().unwrap().seal().unwrap();
    assert_eq!((frozen.method, frozen.copied_bytes), (FreezeMethod::Layered, 2 * 4096));
    assert_eq!(bytes(&restore(&frozen.image).unwrap()), [2, 3]);
    warm.remap(&image()).unwrap();
    assert_eq!(bytes(&warm), [2, 1], "and once more");
}

#[test]
fn memory_is_restored_from_files_on_disk_that_may_be_longer() {
    let write = |part: &ImageFile, tail: usize| {
        let mut contents = vec![0; 2 << 20];
        part.file().read_exact_at(&mut contents, 0).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        rustix::fs::ftruncate(&file, 2 * MIB).unwrap();
        for (at, page) in (0..).step_by(4096).zip(contents.chunks(4096)) {
            if page.iter().any(|byte| *byte != 0) {
                file.write_at(page, at).unwrap();
            }
        }
        std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).unwrap();
        file.write_all(&vec![9; tail]).unwrap();
        ImageFile::on_disk(Arc::new(file)).unwrap()
    };
    let sealed = image();
    let on_disk = MemoryImage {
        base: write(&sealed.base, 100),
        layer: sealed.layer.as_ref().map(|layer| write(layer, 0)),
    };
    let child = restore(&on_disk).unwrap();
    assert_eq!(bytes(&child), [2, 1]);
    child.view().write_obj(4u8, GuestAddress(MIB)).unwrap();
    let frozen = child.freeze().unwrap().seal().unwrap();
    assert_eq!(frozen.copied_bytes, 2 * 4096, "what lies behind the memory is none of it");
    assert_eq!(bytes(&restore(&frozen.image).unwrap()), [2, 4]);
    // The base has a hole here.
    child.discard(GuestAddress(0), 4096).unwrap();
    assert_eq!(bytes(&child), [0, 4]);
    assert_eq!(bytes(&restore(&child.freeze().unwrap().seal().unwrap().image).unwrap()), [0, 4]);
    let short = MemoryImage { base: write(&image().base, 0), layer: None };
    short.base.file().set_len(2 * MIB - 1).unwrap();
    assert!(matches!(restore(&short), Err(RestoreMemoryError::Image { part: ImagePart::Base, .. })));
}

#[test]
fn a_layers_pages_of_zeros_may_be_holes_if_it_has_a_list() {
    let base = image().base;
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * MIB + 5).unwrap();
    file.write_at(&[6], 4096).unwrap();
    let listed = |pages: Vec<_>| {
        ImageFile::on_disk(Arc::new(file.try_clone().unwrap()))
            .unwrap()
            .with_memory_bytes(2 * MIB)
            .with_pages(pages)
    };
    let layer = listed(vec![0..8192, MIB..MIB + 4096]);
    let image = MemoryImage { base, layer: Some(layer) };
    let byte = |memory: &GuestMemory, at| memory.view().read_obj::<u8>(GuestAddress(at)).unwrap();
    for options in [MemoryOptions::default(), MemoryOptions { prefault: true, ..MemoryOptions::default() }] {
        let child = GuestMemory::restore(&image, 2 * MIB, options, None).unwrap();
        assert_eq!([0, 4096, MIB].map(|at| byte(&child, at)), [0, 6, 0], "the base has 1 at 1 MiB");
        let frozen = child.freeze().unwrap().seal().unwrap();
        assert_eq!([0, 4096, MIB].map(|at| byte(&restore(&frozen.image).unwrap(), at)), [0, 6, 0]);
    }
    for (pages, bytes) in
        [(vec![0..4096, MIB..2 * MIB + 4096], 2 * MIB + 4096), (vec![0..4096, MIB..3 * MIB], 3 * MIB)]
    {
        let wrong = MemoryImage { layer: Some(listed(pages)), ..image.clone() };
        let text = format!("the memory image's layer has {bytes} bytes, but the memory has 2097152");
        assert_eq!(restore(&wrong).unwrap_err().to_string(), text);
    }
}

#[test]
fn memory_in_a_longer_file_is_of_its_own_size() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(3 * MIB).unwrap();
    let of = |bytes| MemoryImage {
        base: ImageFile::on_disk(file.clone()).unwrap().with_memory_bytes(bytes),
        layer: None,
    };
    assert!(restore(&of(2 * MIB)).is_ok());
    for bytes in [MIB, 2 * MIB + 4096] {
        let text = format!("the memory image's base has {bytes} bytes, but the memory has 2097152");
        assert_eq!(restore(&of(bytes)).unwrap_err().to_string(), text);
    }
    file.set_len(MIB).unwrap();
    assert!(restore(&of(2 * MIB)).is_err(), "it was cut short");
}

/// The longest runs are mapped, the others copied.
#[test]
fn a_layer_of_many_runs_costs_few_mappings() {
    const RUNS: u64 = 2000;
    let parent = memory(16 * RUNS * 4096);
    let write = |at: u64, value: u8| parent.view().write_obj(value, GuestAddress(at * 4096)).unwrap();
    (0..16 * RUNS).for_each(|page| write(page, 1));
    parent.freeze().unwrap().seal().unwrap();
    for run in 0..RUNS {
        // Every tenth is of three pages.
        let pages = if run % 10 == 0 { 3 } else { 1 };
        (0..pages).for_each(|page| write(16 * run + page, 2));
    }
    let frozen = parent.freeze().unwrap().seal().unwrap();
    let child = GuestMemory::restore(&frozen.image, frozen.bytes, MemoryOptions::default(), None).unwrap();
    let layer = frozen.image.layer.as_ref().unwrap().file();
    assert_eq!(mappings(layer), 512);
    for page in 0..16 * RUNS {
        let in_run = if page / 16 % 10 == 0 { 3 } else { 1 };
        let expected = if page % 16 < in_run { 2 } else { 1 };
        assert_eq!(child.view().read_obj::<u8>(GuestAddress(page * 4096)).unwrap(), expected, "page {page}");
    }
    assert_eq!(child.freeze().unwrap().seal().unwrap().copied_bytes, frozen.copied_bytes);
}
