//! Random requests, with stops in between, against a disk that is a vector.

use super::*;
use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;

/// Some more than two clusters of an overlay.
const DISK: u64 = 260;

#[derive(Debug, Clone)]
enum Step {
    Read { sector: u64, sectors: u64, cut: u32 },
    Write { sector: u64, sectors: u64, seed: u64, cut: usize },
    Zero { sector: u64, sectors: u64, unmap: bool },
    Flush,
    Restart,
    Writeback(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || (0..DISK + 2, prop_oneof![0..9u64, 100..200u64]);
    let step = prop_oneof![
        4 => (place(), 1..600u32).prop_map(|((sector, sectors), cut)| Step::Read { sector, sectors, cut }),
        4 => (place(), any::<u64>(), 1..600usize)
            .prop_map(|((sector, sectors), seed, cut)| Step::Write { sector, sectors, seed: seed >> 16, cut }),
        2 => (place(), any::<bool>())
            .prop_map(|((sector, sectors), unmap)| Step::Zero { sector, sectors, unmap }),
        1 => Just(Step::Flush),
        1 => Just(Step::Restart),
        1 => any::<bool>().prop_map(Step::Writeback),
    ];
    prop::collection::vec(step, 1..40)
}

fn backings() -> impl Strategy<Value = Backing> {
    prop::sample::select(Backing::ALL.to_vec())
}

fn inside(sector: u64, sectors: u64) -> Option<std::ops::Range<usize>> {
    let bytes = |sectors| usize::try_from(sectors * 512).unwrap();
    (sectors > 0 && sector + sectors <= DISK).then(|| bytes(sector)..bytes(sector + sectors))
}

fn expected(range: &Option<std::ops::Range<usize>>) -> u8 {
    if range.is_some() { OK } else { IO_ERROR }
}

fn go(stage: &mut Stage, model: &mut [u8], step: &Step) {
    match *step {
        Step::Read { sector, sectors, cut } => {
            let bytes = u32::try_from(sectors * 512).unwrap();
            let pieces = [cut.min(bytes), bytes.saturating_sub(cut)].map(Buffer::In);
            let pieces: Vec<_> = pieces.into_iter().filter(|piece| *piece != Buffer::In(0)).collect();
            let (status, reply) = stage.request(VIRTIO_BLK_T_IN, sector, &pieces);
            let range = inside(sector, sectors);
            assert_eq!(status, expected(&range));
            if let Some(range) = range {
                assert!(reply.data == model[range], "{step:?}");
            }
        }
        Step::Write { sector, sectors, seed, cut } => {
            let data = pattern(seed, sectors);
            let (one, two) = data.split_at(cut.min(data.len()));
            let pieces: Vec<_> =
                [one, two].into_iter().filter(|piece| !piece.is_empty()).map(Buffer::Out).collect();
            let range = inside(sector, sectors);
            assert_eq!(stage.request(VIRTIO_BLK_T_OUT, sector, &pieces).0, expected(&range));
            if let Some(range) = range {
                model[range].copy_from_slice(&data);
            }
        }
        Step::Zero { sector, sectors, unmap } => {
            let range = inside(sector, sectors);
            let status = {
                let sectors = u32::try_from(sectors).unwrap();
                stage.range(VIRTIO_BLK_T_WRITE_ZEROES, sector, sectors, unmap.into())
            };
            assert_eq!(status, expected(&range));
            if let Some(range) = range {
                model[range].fill(0);
            }
        }
        Step::Flush => assert_eq!(stage.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK),
        Step::Restart => {
            stage.driver.stop();
            stage.driver.start();
        }
        Step::Writeback(on) => stage.driver.write_config(32, u8::from(on)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_disk_is_a_vector_of_sectors(backing in backings(), steps in steps()) {
        let file = backing.file(DISK);
        let image = backing.image(&file);
        let mut stage = Stage::with(file_again(&file), image, Shape::default());
        let mut model = pattern(0, DISK);
        for step in &steps {
            go(&mut stage, &mut model, step);
        }
        prop_assert!(stage.read(0, DISK) == (OK, model.clone()));
        drop(stage);
        let kept = if backing.is_overlay() { pattern(0, DISK) } else { model };
        prop_assert!(backing.contents(&file, DISK) == kept);
    }
}
