//! The floating-point types of tensors, and slices of them whose type is known at run time.

use half::{bf16, f16};

use crate::{Error, Result};

/// Element type of activations, dequantized weights and stored scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    Float32,
    /// IEEE binary16.
    Float16,
    /// The upper half of binary32.
    Bfloat16,
}

impl Dtype {
    /// Every dtype, in the order of the documentation.
    pub const ALL: [Self; 3] = [Self::Float32, Self::Float16, Self::Bfloat16];

    /// torch's name without the prefix, for instance `"bfloat16"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Float32 => 4,
            Self::Float16 | Self::Bfloat16 => 2,
        }
    }

    /// The dtype that is called `name`; `argument` is named in the error.
    pub fn parse(argument: &'static str, name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| Error::invalid(argument, format!("{name:?}"), "float32, float16 or bfloat16"))
    }
}

/// A number type that tensors hold; every one converts to `f32` exactly.
pub trait Element: Copy + Send + Sync + 'static {
    /// The run-time name of the type.
    const DTYPE: Dtype;
    /// Exact conversion.
    fn to_f32(self) -> f32;
    /// Conversion with one rounding to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::Float32;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::Float16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        Self::to_f32(self)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bfloat16;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// A borrowed slice of one of the dtypes.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// `float32` values.
    Float32(&'a [f32]),
    /// `float16` values.
    Float16(&'a [f16]),
    /// `bfloat16` values.
    Bfloat16(&'a [bf16]),
}

/// A mutably borrowed slice of one of the dtypes.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// `float32` values.
    Float32(&'a mut [f32]),
    /// `float16` values.
    Float16(&'a mut [f16]),
    /// `bfloat16` values.
    Bfloat16(&'a mut [bf16]),
}

/// Runs `$body` with `$slice` bound to the typed slice inside a [`Floats`] or [`FloatsMut`].
macro_rules! with_floats {
    ($floats:expr, $enum:ident, $slice:ident => $body:expr) => {
        match $floats {
            $crate::dtype::$enum::Float32($slice) => $body,
            $crate::dtype::$enum::Float16($slice) => $body,
            $crate::dtype::$enum::Bfloat16($slice) => $body,
        }
    };
}
pub(crate) use with_floats;

impl Floats<'_> {
    /// Element type.
    pub fn dtype(&self) -> Dtype {
        with_floats!(self, Floats, slice => dtype_of(slice))
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        with_floats!(self, Floats, slice => slice.len())
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `index` as `f32`.
    #[inline]
    pub fn get(&self, index: usize) -> f32 {
        with_floats!(self, Floats, slice => slice[index].to_f32())
    }
}

impl FloatsMut<'_> {
    /// Element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Float32(_) => Dtype::Float32,
            Self::Float16(_) => Dtype::Float16,
            Self::Bfloat16(_) => Dtype::Bfloat16,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        with_floats!(self, FloatsMut, slice => slice.len())
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn dtype_of<T: Element>(_: &[T]) -> Dtype {
    T::DTYPE
}
