//! cofferdam-example-embed.
