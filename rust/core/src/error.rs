//! The one error type of the core.

/// What went wrong, with the argument's name, what it got and what it takes.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An argument has a value outside what the function takes.
    #[error("{argument}: got {got}, expected {expected}")]
    InvalidArgument {
        /// The argument's name as the Python caller knows it.
        argument: &'static str,
        /// The value that was passed.
        got: String,
        /// The values that are taken.
        expected: String,
    },
    /// A weight holds NaN or an infinity.
    #[error(
        "tensor: element {index:?} is {value}, expected finite values \
         (nonfinite=\"propagate\" turns its whole block into NaN instead)"
    )]
    NonFinite {
        /// Position in the tensor, one entry a dimension: the first bad one in row-major order.
        index: Vec<usize>,
        /// The value found there.
        value: f32,
    },
    /// A combination that is well formed but not served.
    #[error("{what}: not supported: {reason}")]
    Unsupported {
        /// The feature that was asked for.
        what: &'static str,
        /// Why not, and what to use instead.
        reason: String,
    },
    /// CUDA is missing or failed.
    #[error("{what}: {reason}")]
    Cuda {
        /// What was tried: the driver's function, and the kernel and shapes where it was a launch.
        what: String,
        /// CUDA's own name for the error and its description, or what is missing.
        reason: String,
    },
}

/// A result with the core's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An [`Error::InvalidArgument`] for `argument`.
    pub fn invalid(argument: &'static str, got: impl std::fmt::Display, expected: impl Into<String>) -> Self {
        Self::InvalidArgument { argument, got: got.to_string(), expected: expected.into() }
    }
}
