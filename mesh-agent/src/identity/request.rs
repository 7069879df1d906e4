//! Requests for certificates: what PKCS#10 bytes ask for (RFC 2986), and making one.
//!
//! Nothing of what is read is judged here, but whether the requester holds the key: the API server
//! does not ask for that. [`mesh_core::sign`] decides.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use mesh_core::sign::{Asked, Key, Name, Unread};
use mesh_core::spiffe::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;

/// No honest request is a quarter of this.
const MAX_BYTES: usize = 4096;

/// SubjectPublicKeyInfo of an uncompressed point on P-256 (RFC 5480 section 2), without the point.
const P256: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a,
    0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// The byte that says so, and two coordinates (SEC 1 section 2.3.3).
const P256_POINT_BYTES: usize = 65;

/// `ecdsa-with-SHA256` (RFC 5758 section 3.2).
const ECDSA_WITH_SHA256: &str = "1.2.840.10045.4.3.2";

/// A request that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Read {
    /// What it asks for.
    pub asked: Asked,
    /// SubjectPublicKeyInfo, in DER.
    pub public_key: Vec<u8>,
}

/// Reads one request in PEM, and verifies that it is signed with its key if that is a key of ours.
///
/// # Errors
///
/// If it is not a request, or if whoever made it does not hold the key.
pub fn read(pem: &[u8]) -> Result<Read, Unread> {
    if pem.len() > MAX_BYTES {
        return Err(Unread::Malformed);
    }
    let mut blocks = CertificateSigningRequestDer::pem_slice_iter(pem);
    let (Some(Ok(der)), None) = (blocks.next(), blocks.next()) else {
        return Err(Unread::Malformed);
    };
    let Ok(([], request)) = X509CertificationRequest::from_der(&der) else {
        return Err(Unread::Malformed);
    };
    let info = &request.certification_request_info;
    let public_key = info.subject_pki.raw;
    let point = public_key.strip_prefix(P256).filter(|point| point.len() == P256_POINT_BYTES);
    let key = match point {
        Some(point) => {
            let is_usual =
                request.signature_algorithm.algorithm.to_id_string() == ECDSA_WITH_SHA256;
            let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point);
            let proven = key.verify(info.raw, &request.signature_value.data);
            if !is_usual || proven.is_err() {
                return Err(Unread::Unproven);
            }
            Key::EcdsaP256
        }
        None => Key::Other,
    };
    let mut asked = Asked {
        names: Vec::new(),
        key,
        has_subject: info.subject.iter_attributes().next().is_some(),
        is_ca: false,
        has_more: false,
    };
    for attribute in info.iter_attributes() {
        match attribute.parsed_attribute() {
            ParsedCriAttribute::ExtensionRequest(requested) => {
                for extension in &requested.extensions {
                    take(&mut asked, extension.parsed_extension());
                }
            }
            _ => asked.has_more = true,
        }
    }
    Ok(Read { asked, public_key: public_key.to_vec() })
}

/// What a request holds besides names is only told, not kept.
fn take(asked: &mut Asked, extension: &ParsedExtension<'_>) {
    match extension {
        ParsedExtension::SubjectAlternativeName(names) => {
            let name = |name: &GeneralName<'_>| match name {
                GeneralName::URI(uri) => Name::Uri((*uri).to_owned()),
                _ => Name::Other,
            };
            asked.names.extend(names.general_names.iter().map(name));
        }
        ParsedExtension::BasicConstraints(constraints) if constraints.ca => asked.is_ca = true,
        ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() || usage.crl_sign() => {
            asked.is_ca = true;
        }
        _ => asked.has_more = true,
    }
}

/// A request for `id`, in PEM, signed with `key`. What the key is for and for how long is said in
/// the API's own fields.
///
/// # Errors
///
/// If the cryptographic library refuses.
pub fn make(id: &SpiffeId, key: &KeyPair) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.to_string().as_str().try_into()?)];
    params.serialize_request(key)?.pem()
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
        PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519,
    };

    use super::*;
    use crate::identity::testing::id;

    fn key() -> KeyPair {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
    }

    fn asked(change: impl FnOnce(&mut CertificateParams)) -> Asked {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![uri("spiffe://cluster.local/ns/default/sa/web")];
        change(&mut params);
        let pem = params.serialize_request(&key()).unwrap().pem().unwrap();
        read(pem.as_bytes()).unwrap().asked
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn web() -> Asked {
        Asked {
            names: vec![Name::Uri("spiffe://cluster.local/ns/default/sa/web".into())],
            key: Key::EcdsaP256,
            has_subject: false,
            is_ca: false,
            has_more: false,
        }
    }

    #[test]
    fn request_that_we_make_asks_for_a_name_and_nothing_else() {
        let key = key();
        let read = read(make(&id("web"), &key).unwrap().as_bytes()).unwrap();
        assert_eq!(read.asked, web());
        assert_eq!(read.public_key, rcgen::PublicKeyData::subject_public_key_info(&key));
    }

    #[test]
    fn whatever_else_is_asked_for_is_seen() {
        assert_eq!(asked(|_| {}), web());
        let with = |change: fn(&mut Asked)| {
            let mut asked = web();
            change(&mut asked);
            asked
        };
        let other = Name::Uri("spiffe://cluster.local/ns/default/sa/other".into());
        assert_eq!(
            asked(|p| p.subject_alt_names.push(uri("spiffe://cluster.local/ns/default/sa/other"))),
            Asked { names: vec![web().names[0].clone(), other], ..web() }
        );
        let dns = asked(|p| p.subject_alt_names.push(SanType::DnsName("web".try_into().unwrap())));
        assert_eq!(dns.names, [web().names[0].clone(), Name::Other]);
        let named = asked(|p| p.distinguished_name.push(DnType::CommonName, "admin"));
        assert_eq!(named, with(|asked| asked.has_subject = true));
        let ca = with(|asked| asked.is_ca = true);
        assert_eq!(asked(|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), ca);
        assert_eq!(asked(|p| p.key_usages = vec![KeyUsagePurpose::KeyCertSign]), ca);
        let more = with(|asked| asked.has_more = true);
        assert_eq!(asked(|p| p.is_ca = IsCa::ExplicitNoCa), more);
        assert_eq!(asked(|p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]), more);
        let usage = vec![ExtendedKeyUsagePurpose::CodeSigning];
        assert_eq!(asked(|p| p.extended_key_usages = usage), more);
        let custom = rcgen::CustomExtension::from_oid_content(&[1, 2, 3], vec![5, 0]);
        assert_eq!(asked(|p| p.custom_extensions = vec![custom]), more);
    }

    #[test]
    fn key_of_another_kind_is_seen() {
        for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let pem = make(&id("web"), &key).unwrap();
            assert_eq!(read(pem.as_bytes()).unwrap().asked, Asked { key: Key::Other, ..web() });
        }
    }

    /// Signs with one key, and names another: somebody else's key must not be certified for us.
    #[test]
    fn request_for_somebody_elses_key_is_unproven() {
        struct Borrowed {
            named: KeyPair,
            signs: KeyPair,
        }
        impl rcgen::PublicKeyData for Borrowed {
            fn der_bytes(&self) -> &[u8] {
                self.named.der_bytes()
            }
            fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
                rcgen::PublicKeyData::algorithm(&self.named)
            }
        }
        impl rcgen::SigningKey for Borrowed {
            fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
                self.signs.sign(message)
            }
        }
        let params = CertificateParams::default();
        let borrowed = Borrowed { named: key(), signs: key() };
        let pem = params.serialize_request(&borrowed).unwrap().pem().unwrap();
        assert_eq!(read(pem.as_bytes()), Err(Unread::Unproven));
    }

    #[test]
    fn what_is_not_one_request_is_malformed() {
        let pem = make(&id("web"), &key()).unwrap();
        let cert = CertificateParams::default().self_signed(&key()).unwrap().pem();
        for text in [
            String::new(),
            "hello".to_owned(),
            cert,
            pem.repeat(2),
            pem.replacen("MI", "AI", 1),
            format!("{pem}{}", " ".repeat(MAX_BYTES)),
        ] {
            assert_eq!(read(text.as_bytes()), Err(Unread::Malformed), "{text}");
        }
    }
}
