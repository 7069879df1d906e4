//! authorize.
