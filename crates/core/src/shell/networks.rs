//! Sets of networks, as they stand in configurations: whose word about others is believed. Not a firewall.

use std::net::IpAddr;

use serde::{Deserialize, Deserializer, de};

/// Addresses by their first bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Networks(Vec<Network>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u32,
}

/// What is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no network: write an IP address, or one with the number of its leading bits, as in 10.0.0.0/8")]
pub struct NetworkError(String);

impl Networks {
    /// The machine itself.
    #[must_use]
    pub fn loopback() -> Self {
        let v4 = Network { address: IpAddr::from([127, 0, 0, 0]), bits: 8 };
        let v6 = Network { address: IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), bits: 128 };
        Self(vec![v4, v6])
    }

    /// Reads addresses, with or without `/` and a number of bits.
    ///
    /// # Errors
    /// The first text that is neither.
    pub fn parse<'t>(texts: impl IntoIterator<Item = &'t str>) -> Result<Self, NetworkError> {
        texts.into_iter().map(Network::parse).collect::<Result<_, _>>().map(Self)
    }

    /// Whether one of them has the address. IPv4 within IPv6 is the same as without.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(address))
    }

    /// Each as text, with its bits.
    pub fn texts(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|network| format!("{}/{}", network.address, network.bits))
    }
}

impl Network {
    fn parse(text: &str) -> Result<Self, NetworkError> {
        let wrong = || NetworkError(text.to_owned());
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.trim().parse().map_err(|_unparsed| wrong())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(all), |bits| bits.trim().parse::<u32>().map_err(|_unparsed| wrong()))?;
        if bits > all { Err(wrong()) } else { Ok(Self { address, bits }) }
    }

    fn contains(self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                let differ = own.to_bits() ^ other.to_bits();
                differ.leading_zeros() >= self.bits
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => {
                let differ = own.to_bits() ^ other.to_bits();
                differ.leading_zeros() >= self.bits
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl<'de> Deserialize<'de> for Networks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        Self::parse(texts.iter().map(String::as_str)).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::Networks;

    #[test]
    fn addresses_are_found_by_their_leading_bits() {
        let check = |texts: &[&str], address: &str, wanted: bool| {
            let networks = Networks::parse(texts.iter().copied()).expect("networks");
            assert_eq!(networks.contains(address.parse().expect("address")), wanted, "{address} in {texts:?}");
        };
        check(&["10.0.0.0/8"], "10.255.0.1", true);
        check(&["10.0.0.0/8"], "11.0.0.1", false);
        check(&["192.0.2.7"], "192.0.2.7", true);
        check(&["192.0.2.7"], "192.0.2.6", false);
        check(&["192.0.2.0/31", "2001:db8::/32"], "2001:db8:1::7", true);
        check(&["0.0.0.0/0"], "::1", false);
        check(&["0.0.0.0/0"], "203.0.113.9", true);
        check(&["10.0.0.0/8"], "::ffff:10.0.0.1", true);
        check(&[], "127.0.0.1", false);
        assert!(Networks::loopback().contains("127.0.0.9".parse().expect("address")));
        assert!(Networks::loopback().contains("::1".parse().expect("address")));
    }

    #[test]
    fn what_is_no_network_is_named() {
        for text in ["", "here", "10.0.0.0/33", "10.0.0.0/", "::1/129", "10.0.0.0/8/8", "10.0.0/8"] {
            let error = Networks::parse([text]).expect_err(text).to_string();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }
}
