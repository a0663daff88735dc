//! The macro that a table of states is written with.

/// A table of numbered states: `number Kind getter setter: Type`, in the order in which they are restored.
///
/// Everything that is done with all of them comes from it: the kinds with their numbers and names, the trait that a hypervisor
/// implements, the same with its error erased, and the collection that is saved, restored, compared and inspected.
macro_rules! state_table {
    (
        $(#[$kind_doc:meta])* kind $Kind:ident;
        $(#[$access_doc:meta])* access $Access:ident, erased $Erased:ident;
        $(#[$state_doc:meta])* state $State:ident;
        $($(#[$doc:meta])* $number:literal $Name:ident $get:ident $set:ident: $Type:ty,)*
    ) => {
        $(#[$kind_doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $Kind {
            $($(#[$doc])* $Name = $number,)*
        }

        impl $Kind {
            /// Every kind, in the order in which they are restored.
            pub const ALL: &[Self] = &[$(Self::$Name,)*];

            /// Its number, which never changes: saved states know it by this.
            pub fn number(self) -> u32 {
                self as u32
            }

            /// Its name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$Name => stringify!($get),)*
                }
            }
        }

        impl std::fmt::Display for $Kind {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        $(#[$access_doc])*
        pub trait $Access {
            /// What can go wrong.
            type Error: std::error::Error + From<$crate::NotSupported> + Send + Sync + 'static;

            /// Whether the hypervisor has this state. One that it lacks can be neither read nor set, and leaves its two methods
            /// as they are here: [`crate::NotSupported`].
            fn supports(&self, kind: $Kind) -> bool;

            $(
                #[doc = concat!("Reads the state: ", stringify!($get), ".")]
                fn $get(&mut self) -> Result<$Type, Self::Error> {
                    Err($crate::NotSupported(stringify!($get).into()).into())
                }

                #[doc = concat!("Sets the state: ", stringify!($get), ".")]
                fn $set(&mut self, _: &$Type) -> Result<(), Self::Error> {
                    Err($crate::NotSupported(stringify!($get).into()).into())
                }
            )*
        }

        #[doc = concat!("[`", stringify!($Access), "`] with its error erased, so that it can be a trait object.")]
        pub trait $Erased {
            #[doc = concat!("As [`", stringify!($Access), "::supports`].")]
            fn supports(&self, kind: $Kind) -> bool;

            $(
                #[doc = concat!("As [`", stringify!($Access), "::", stringify!($get), "`].")]
                fn $get(&mut self) -> Result<$Type, StateError>;

                #[doc = concat!("As [`", stringify!($Access), "::", stringify!($set), "`].")]
                fn $set(&mut self, value: &$Type) -> Result<(), StateError>;
            )*
        }

        impl<T: $Access> $Erased for T {
            fn supports(&self, kind: $Kind) -> bool {
                $Access::supports(self, kind)
            }

            $(
                fn $get(&mut self) -> Result<$Type, StateError> {
                    Ok($Access::$get(self)?)
                }

                fn $set(&mut self, value: &$Type) -> Result<(), StateError> {
                    Ok($Access::$set(self, value)?)
                }
            )*
        }

        $(#[$state_doc])*
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct $State {
            $($(#[$doc])* pub $get: Option<$Type>,)*
        }

        impl $State {
            /// Reads every state that the hypervisor has, in the reverse of the order in which they are restored: what is on its
            /// way comes to rest first.
            pub fn save(from: &mut dyn $Erased) -> Result<Self, StateAccessError<$Kind>> {
                Self::save_some(from, |_| true)
            }

            /// Reads the states that are wanted, of those that the hypervisor has.
            pub fn save_some(
                from: &mut dyn $Erased,
                wanted: impl Fn($Kind) -> bool,
            ) -> Result<Self, StateAccessError<$Kind>> {
                let mut state = Self::default();
                for &kind in $Kind::ALL.iter().rev() {
                    if wanted(kind) && from.supports(kind) {
                        state.read(kind, from).map_err(|source| StateAccessError::Read { kind, source })?;
                    }
                }
                Ok(state)
            }

            /// Sets every state that is here, in the order of the table. If the hypervisor lacks one, none is set.
            ///
            /// In debug builds each is read back afterwards, and compared.
            pub fn restore(&self, to: &mut dyn $Erased) -> Result<(), StateAccessError<$Kind>> {
                let lacking: Vec<_> = self.kinds().filter(|kind| !to.supports(*kind)).collect();
                if !lacking.is_empty() {
                    return Err(StateAccessError::Lacking(lacking));
                }
                $(
                    if let Some(value) = &self.$get {
                        let kind = $Kind::$Name;
                        to.$set(value).map_err(|source| StateAccessError::Set { kind, source })?;
                    }
                )*
                if cfg!(debug_assertions) { self.compare(to) } else { Ok(()) }
            }

            /// The states that are here.
            pub fn kinds(&self) -> impl Iterator<Item = $Kind> {
                let here = [$(self.$get.as_ref().map(|_| $Kind::$Name),)*];
                here.into_iter().flatten()
            }

            /// The states that differ, apart from what changes by itself while nothing runs.
            pub fn differences(&self, other: &Self) -> Vec<$Kind> {
                let (ours, theirs) = (self.settled(), other.settled());
                let differ = [$((ours.$get != theirs.$get).then_some($Kind::$Name),)*];
                differ.into_iter().flatten().collect()
            }

            fn compare(&self, with: &mut dyn $Erased) -> Result<(), StateAccessError<$Kind>> {
                let now = Self::save_some(with, |kind| self.kinds().any(|here| here == kind))?;
                match self.differences(&now) {
                    differ if differ.is_empty() => Ok(()),
                    differ => Err(StateAccessError::ReadBack(differ)),
                }
            }

            fn read(&mut self, kind: $Kind, from: &mut dyn $Erased) -> Result<(), StateError> {
                match kind {
                    $($Kind::$Name => self.$get = Some(from.$get()?),)*
                }
                Ok(())
            }
        }

        impl dyn $Erased + '_ {
            /// Shows every state that the hypervisor has, each as a child that is read only if it is asked for.
            pub fn inspect_states(&mut self, response: &mut inspect::Response<'_>) {
                $(
                    if self.supports($Kind::$Name) {
                        response.child(stringify!($get), |request| match self.$get() {
                            Ok(value) => inspect::Inspect::inspect(&value, request),
                            Err(error) => request.value(format!("cannot be read: {error}")),
                        });
                    }
                )*
            }
        }
    };
}

pub(super) use state_table;
