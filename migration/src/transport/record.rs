//! Protection of records (RFC 8446, section 5), from one buffer into another.
//!
//! rustls runs the handshake, and would protect records too, but copies each byte twice more at the receiving end and once
//! more at the sending one; `docs/design/0008` has the measurements.

use aws_lc_rs::aead::{Aad, LessSafeKey, NONCE_LEN, Nonce, TlsProtocolId, TlsRecordSealingKey, UnboundKey};
use aws_lc_rs::error::Unspecified;
use rustls::AlertDescription;

use super::keys::{Keys, Traffic};

/// Type, version, length.
pub(super) const HEAD: usize = 5;
/// Most plain bytes in a record.
pub(super) const MAX_PLAIN: usize = 1 << 14;
/// Content type and tag.
const TRAILER: usize = 1 + TAG;
const TAG: usize = 16;
/// Longest record that may be sent by anyone: the cipher may add 256 bytes.
pub(super) const MAX_RECORD: usize = HEAD + MAX_PLAIN + 256;
/// Longest that is sent here.
pub(super) const MAX_SENT: usize = HEAD + MAX_PLAIN + TRAILER;
/// Records after which the sending key is replaced; RFC 8446, section 5.5, allows 2^24.5 for AES-GCM.
const KEY_RECORDS: u64 = 1 << 22;

/// What a record carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Alert = 21,
    Handshake = 22,
    Data = 23,
}

/// A record that is refused, and the alert that the peer gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) alert: AlertDescription,
    pub(super) detail: &'static str,
}

const fn refused(alert: AlertDescription, detail: &'static str) -> Refused {
    Refused { alert, detail }
}

/// The nonce of a record: its number, mixed with the initial vector (section 5.3).
fn nonce(iv: &[u8; NONCE_LEN], sequence: u64) -> Nonce {
    let mut bytes = *iv;
    for (byte, number) in bytes[NONCE_LEN - 8..].iter_mut().zip(sequence.to_be_bytes()) {
        *byte ^= number;
    }
    Nonce::assume_unique_for_key(bytes)
}

/// Protects what is sent.
pub(super) struct Sealer {
    traffic: Traffic,
    key: TlsRecordSealingKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
    key_records: u64,
}

impl Sealer {
    pub(super) fn new(traffic: Traffic) -> Result<Self, Unspecified> {
        let Keys { aead, key, iv } = traffic.keys();
        let key = TlsRecordSealingKey::new(aead, TlsProtocolId::TLS13, &key)?;
        Ok(Self { traffic, key, iv, sequence: 0, key_records: KEY_RECORDS })
    }

    /// Whether the key has protected enough, and [`Sealer::update`] is due.
    pub(super) fn is_worn(&self) -> bool {
        self.sequence >= self.key_records
    }

    /// Writes a record of `plain`, at most [`MAX_PLAIN`] bytes, to the beginning of `out`, which holds [`MAX_SENT`].
    /// Returns its length.
    pub(super) fn seal(&mut self, content: Content, plain: &[u8], out: &mut [u8]) -> Result<usize, Unspecified> {
        let length = plain.len() + TRAILER;
        let (head, rest) = out.split_at_mut(HEAD);
        // Data to whoever looks on, and TLS 1.2 to whatever stands between (section 5.2).
        head.copy_from_slice(&[Content::Data as u8, 3, 3, (length >> 8) as u8, length as u8]);
        let (body, rest) = rest.split_at_mut(plain.len());
        let (nonce, aad) = (nonce(&self.iv, self.sequence), Aad::from(&*head));
        self.key.seal_out_of_place_scatter(nonce, aad, plain, body, &[content as u8], &mut rest[..TRAILER])?;
        self.sequence += 1;
        Ok(HEAD + length)
    }

    /// Writes a record that announces the next key to the beginning of `out`, and takes that key.
    pub(super) fn update(&mut self, out: &mut [u8]) -> Result<usize, Unspecified> {
        let length = self.seal(Content::Handshake, &KEY_UPDATE, out)?;
        self.traffic.update();
        let Keys { aead, key, iv } = self.traffic.keys();
        self.key = TlsRecordSealingKey::new(aead, TlsProtocolId::TLS13, &key)?;
        (self.iv, self.sequence) = (iv, 0);
        Ok(length)
    }
}

/// KeyUpdate with update_not_requested (section 4.6.3).
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
/// The same, and the receiver shall take a new key for what it sends, too.
const KEY_UPDATE_BOTH: [u8; 5] = [24, 0, 0, 1, 1];

/// Opens what arrives.
pub(super) struct Opener {
    traffic: Traffic,
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    sequence: u64,
}

/// What became of a record.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opened {
    /// So many bytes of data.
    Data(usize),
    /// The peer says goodbye.
    Goodbye,
    /// The peer gives up.
    Alert(AlertDescription),
    /// The peer has taken a new key and asks for the same at this end.
    UpdateAsked,
    /// Nothing that needs an answer.
    Nothing,
}

impl Opener {
    pub(super) fn new(traffic: Traffic) -> Result<Self, Unspecified> {
        let Keys { aead, key, iv } = traffic.keys();
        let key = LessSafeKey::new(UnboundKey::new(aead, &key)?);
        Ok(Self { traffic, key, iv, sequence: 0 })
    }

    /// How long the record is that begins here, if enough of it is there to tell.
    pub(super) fn length(bytes: &[u8]) -> Result<Option<usize>, Refused> {
        let &[kind, _, _, high, low, ..] = bytes else { return Ok(None) };
        if kind != Content::Data as u8 {
            return Err(refused(AlertDescription::UnexpectedMessage, "a record came unprotected"));
        }
        let length = HEAD + usize::from(u16::from_be_bytes([high, low]));
        if length > MAX_RECORD {
            return Err(refused(AlertDescription::RecordOverflow, "a record is longer than TLS allows"));
        }
        Ok(Some(length))
    }

    /// Bytes that [`Opener::open`] needs for what it finds in a record of this length.
    pub(super) fn room(length: usize) -> usize {
        length.saturating_sub(HEAD + TAG)
    }

    /// Opens a whole record, into the beginning of `out`, which holds [`Opener::room`].
    pub(super) fn open(&mut self, record: &[u8], out: &mut [u8]) -> Result<Opened, Refused> {
        let bad = refused(AlertDescription::BadRecordMac, "what arrived was changed on its way");
        let inner = out.get_mut(..Self::room(record.len())).ok_or(bad)?;
        let (head, body) = record.split_at_checked(HEAD).ok_or(bad)?;
        let (body, tag) = body.split_at_checked(inner.len()).ok_or(bad)?;
        let (nonce, aad) = (nonce(&self.iv, self.sequence), Aad::from(head));
        self.key.open_separate_gather(nonce, aad, body, tag, inner).map_err(|_| bad)?;
        self.sequence += 1;
        if inner.len() > MAX_PLAIN + 1 {
            return Err(refused(AlertDescription::RecordOverflow, "a record carries more than TLS allows"));
        }
        // The content type stands before the padding (section 5.4).
        let Some(end) = inner.iter().rposition(|&byte| byte != 0) else {
            return Err(refused(AlertDescription::UnexpectedMessage, "a record carries nothing but padding"));
        };
        let (plain, content) = (&inner[..end], inner[end]);
        match content {
            content if content == Content::Data as u8 => Ok(Opened::Data(end)),
            content if content == Content::Alert as u8 => alert(plain),
            content if content == Content::Handshake as u8 => self.handshake(plain),
            _ => Err(refused(AlertDescription::UnexpectedMessage, "a record is of no kind that may come now")),
        }
    }

    /// After the handshake, peers may change their keys; tickets are of no use here, since sessions are never resumed.
    fn handshake(&mut self, plain: &[u8]) -> Result<Opened, Refused> {
        const NEW_SESSION_TICKET: u8 = 4;
        let opened = match plain {
            plain if plain == KEY_UPDATE => Opened::Nothing,
            plain if plain == KEY_UPDATE_BOTH => Opened::UpdateAsked,
            [NEW_SESSION_TICKET, ..] => return Ok(Opened::Nothing),
            _ => {
                return Err(refused(
                    AlertDescription::UnexpectedMessage,
                    "a handshake message came that may not come now",
                ));
            }
        };
        self.traffic.update();
        let Keys { aead, key, iv } = self.traffic.keys();
        let unusable = refused(AlertDescription::InternalError, "the next key cannot be used");
        self.key = LessSafeKey::new(UnboundKey::new(aead, &key).map_err(|_| unusable)?);
        (self.iv, self.sequence) = (iv, 0);
        Ok(opened)
    }
}

fn alert(plain: &[u8]) -> Result<Opened, Refused> {
    match plain {
        // The level says nothing in TLS 1.3 (section 6).
        &[_, description] => Ok(match AlertDescription::from(description) {
            AlertDescription::CloseNotify => Opened::Goodbye,
            // Its goodbye follows.
            AlertDescription::UserCanceled => Opened::Nothing,
            description => Opened::Alert(description),
        }),
        _ => Err(refused(AlertDescription::DecodeError, "an alert is not two bytes long")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::tests::{hex, rfc8448_client};
    use super::*;

    fn pair() -> (Sealer, Opener) {
        let ready = "the key is of the right length";
        (Sealer::new(rfc8448_client()).expect(ready), Opener::new(rfc8448_client()).expect(ready))
    }

    fn open(opener: &mut Opener, record: &[u8]) -> Result<(Opened, Vec<u8>), Refused> {
        let mut out = vec![0; Opener::room(record.len())];
        let opened = opener.open(record, &mut out)?;
        out.truncate(if let Opened::Data(length) = opened { length } else { 0 });
        Ok((opened, out))
    }

    fn data(opener: &mut Opener, record: &[u8]) -> Result<Vec<u8>, Refused> {
        let (opened, data) = open(opener, record)?;
        assert_eq!(opened, Opened::Data(data.len()));
        Ok(data)
    }

    fn sealed(sealer: &mut Sealer, content: Content, plain: &[u8]) -> Vec<u8> {
        let mut out = vec![0; MAX_SENT];
        let length = sealer.seal(content, plain, &mut out).expect("sealed");
        out.truncate(length);
        out
    }

    #[test]
    fn a_record_is_that_of_the_rfcs_trace() {
        let (mut sealer, _) = pair();
        let plain: Vec<u8> = (0..50).collect();
        let record = hex(
            "17 03 03 00 43 a2 3f 70 54 b6 2c 94 d0 af fa fe 82 28 ba 55 cb ef ac ea 42 f9 14 aa 66 bc ab 3f 2b 98 19 \
             a8 a5 b4 6b 39 5b d5 4a 9a 20 44 1e 2b 62 97 4e 1f 5a 62 92 a2 97 70 14 bd 1e 3d ea e6 3a ee bb 21 69 49 \
             15 e4",
        );
        assert_eq!(sealed(&mut sealer, Content::Data, &plain), record);
        let goodbye = hex("17 03 03 00 13 c9 87 27 60 65 56 66 b7 4d 7f f1 15 3e fd 6d b6 d0 b0 e3");
        assert_eq!(sealed(&mut sealer, Content::Alert, &[1, 0]), goodbye);
    }

    #[test]
    fn what_was_sealed_opens_once_in_its_order() {
        let (mut sealer, mut opener) = pair();
        let full = vec![7; MAX_PLAIN];
        let records: Vec<_> =
            [&b"one"[..], b"", &full].iter().map(|plain| sealed(&mut sealer, Content::Data, plain)).collect();
        assert_eq!(Opener::length(&records[0]), Ok(Some(records[0].len())));
        assert_eq!(Opener::length(&records[0][..4]), Ok(None));
        assert_eq!(data(&mut opener, &records[0]), Ok(b"one".to_vec()));
        let again = open(&mut opener, &records[0]).map_err(|refused| refused.alert);
        assert_eq!(again, Err(AlertDescription::BadRecordMac));
        assert_eq!(data(&mut opener, &records[1]), Ok(Vec::new()));
        assert_eq!(data(&mut opener, &records[2]), Ok(full));
    }

    #[test]
    fn a_record_without_room_or_shorter_than_its_tag_is_refused() {
        let (mut sealer, mut opener) = pair();
        let record = sealed(&mut sealer, Content::Data, b"abc");
        let bad = Err(AlertDescription::BadRecordMac);
        assert_eq!(opener.open(&record, &mut [0; 3]).map_err(|refused| refused.alert), bad);
        for length in 0..HEAD + TAG {
            assert_eq!(opener.open(&record[..length], &mut [0; 4]).map_err(|refused| refused.alert), bad);
        }
        assert_eq!(data(&mut opener, &record), Ok(b"abc".to_vec()));
    }

    #[test]
    fn a_changed_bit_is_noticed_wherever_it_is() {
        for at in (0..5).chain([5, 7, 12, 24]) {
            let (mut sealer, mut opener) = pair();
            let mut record = sealed(&mut sealer, Content::Data, b"abc");
            assert_eq!(record.len(), 25);
            record[at] ^= 1;
            assert!(open(&mut opener, &record).is_err(), "byte {at}");
        }
    }

    #[test]
    fn keys_change_in_both_and_what_came_before_stays_closed() {
        let (mut sealer, mut opener) = pair();
        sealer.key_records = 2;
        assert!(!sealer.is_worn());
        for _ in 0..2 {
            let record = sealed(&mut sealer, Content::Data, b"before");
            assert_eq!(data(&mut opener, &record), Ok(b"before".to_vec()));
        }
        assert!(sealer.is_worn());
        let mut update = vec![0; MAX_SENT];
        let length = sealer.update(&mut update).expect("updated");
        assert!(!sealer.is_worn());
        let after = sealed(&mut sealer, Content::Data, b"after");
        assert!(open(&mut pair().1, &after).is_err(), "the first key opens it");
        assert_eq!(open(&mut opener, &update[..length]), Ok((Opened::Nothing, Vec::new())));
        assert_eq!(data(&mut opener, &after), Ok(b"after".to_vec()));
        let both = sealed(&mut sealer, Content::Handshake, &KEY_UPDATE_BOTH);
        assert_eq!(open(&mut opener, &both), Ok((Opened::UpdateAsked, Vec::new())));
    }

    #[test]
    fn what_may_not_come_is_refused_by_its_name() {
        let refusal = |content: Content, plain: &[u8]| {
            let (mut sealer, mut opener) = pair();
            let opened = open(&mut opener, &sealed(&mut sealer, content, plain));
            opened.map(|(opened, _)| opened).map_err(|refused| refused.alert)
        };
        assert_eq!(refusal(Content::Handshake, &[4, 0, 0, 1, 9]), Ok(Opened::Nothing));
        assert_eq!(refusal(Content::Handshake, &[1, 0, 0, 1, 9]), Err(AlertDescription::UnexpectedMessage));
        assert_eq!(refusal(Content::Handshake, &[24, 0, 0, 1, 2]), Err(AlertDescription::UnexpectedMessage));
        assert_eq!(refusal(Content::Alert, &[1, 0]), Ok(Opened::Goodbye));
        assert_eq!(refusal(Content::Alert, &[2, 48]), Ok(Opened::Alert(AlertDescription::UnknownCA)));
        assert_eq!(refusal(Content::Alert, &[2]), Err(AlertDescription::DecodeError));
        let overflow = Opener::length(&[23, 3, 3, 0x41, 1]).map_err(|refused| refused.alert);
        assert_eq!(overflow, Err(AlertDescription::RecordOverflow));
        let unprotected = Opener::length(&[21, 3, 3, 0, 2]).map_err(|refused| refused.alert);
        assert_eq!(unprotected, Err(AlertDescription::UnexpectedMessage));
    }
}
