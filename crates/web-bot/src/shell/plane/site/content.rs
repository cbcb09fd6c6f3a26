//! The body of a static answer, before it is sent.

use std::collections::VecDeque;

use bytes::Bytes;

use super::vault::Extent;

/// What is to be sent after the head.
#[derive(Debug)]
pub(crate) enum Content {
    /// Nothing.
    Empty,
    /// A file, or a part of it.
    Memory(Bytes),
    /// Several parts with their heads.
    Pieces(VecDeque<Bytes>),
    /// What is read from disk while it is sent.
    Disk(Extent),
}
