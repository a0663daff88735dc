//! VPs on their threads: scripted guests are started, stopped, looked at, reset and broken.

mod guest;
mod scripts;
mod stress;
mod thread;
