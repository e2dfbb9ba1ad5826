//! One macro: an enum whose members have a name for operators, a list of all of them, and documents that stand beside both.

/// Defines a fieldless enum with `ALL`, `as_str` and `Display`.
macro_rules! named {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$doc:meta])* $member:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $member,)+ }

        impl $name {
            /// Every member, in the order of the definition.
            pub const ALL: &'static [$name] = &[$($name::$member),+];

            /// The name as it is printed and written to JSON: kebab-case, stable.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$member => $text,)+ }
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

pub(crate) use named;
