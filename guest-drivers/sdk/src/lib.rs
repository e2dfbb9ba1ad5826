//! cofferdam-sdk.
