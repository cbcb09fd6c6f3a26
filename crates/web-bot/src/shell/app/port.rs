//! A port on loopback for one instance of the app, which no other web bot on this machine gives to its own meanwhile. The app
//! listens there itself: between the draw and that the port is nobody's, and another bot could draw it, too.

use std::{
    io,
    net::{Ipv4Addr, TcpListener},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixDatagram},
    },
};

/// How often another port is drawn when one is another bot's already. Ports are drawn from some 28 000, and a machine has a few bots.
const DRAWS_MAX: usize = 32;

/// A port, until this is dropped.
#[derive(Debug)]
pub(super) struct Port {
    number: u16,
    /// Nothing where the kernel has no such names for us: a port is drawn twice once in a blue moon.
    _lock: Option<UnixDatagram>,
}

impl Port {
    /// Draws one that is free.
    pub(super) fn draw() -> io::Result<Self> {
        Self::draw_from(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
    }

    fn draw_from(mut draw: impl FnMut() -> io::Result<TcpListener>) -> io::Result<Self> {
        // What another bot has is kept from us until one is found, so that it is not drawn again.
        let mut passed_over = Vec::new();
        while passed_over.len() < DRAWS_MAX {
            let listener = draw()?;
            let number = listener.local_addr()?.port();
            match lock(number) {
                Ok(lock) => return Ok(Self { number, _lock: Some(lock) }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => passed_over.push(listener),
                Err(_not_here) => return Ok(Self { number, _lock: None }),
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, "every port on loopback that was drawn is another web bot's"))
    }

    pub(super) const fn number(&self) -> u16 {
        self.number
    }
}

/// Takes a name that belongs to the same network as the port, whoever runs the bots and wherever their files are. It is free again
/// when the bot ends, in whichever way.
fn lock(port: u16) -> io::Result<UnixDatagram> {
    UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(format!("bots/web-app/{port}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_another_bot_has_given_to_its_app_is_not_given_to_ours() {
        let first = Port::draw().expect("a port");
        let taken = first.number();
        // Its app does not listen yet: the kernel may well give the port away again.
        let mut draws = [taken, 0].into_iter();
        let second =
            Port::draw_from(|| TcpListener::bind((Ipv4Addr::LOCALHOST, draws.next().expect("two are enough"))));
        assert_ne!(second.expect("another port").number(), taken);
        drop(first);
        let again = Port::draw_from(|| TcpListener::bind((Ipv4Addr::LOCALHOST, taken)));
        assert_eq!(again.expect("free again").number(), taken);
    }
}
