//! A guest's side of a virtio device: a driver over real guest memory, for tests, fuzzing and benchmarks.
