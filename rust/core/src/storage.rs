//! One packed weight: validated views of its buffers. The owner of the memory is the caller.

use crate::codebook::Codebook;
use crate::dtype::{Dtype, Floats, FloatsMut};
use crate::format::{BlockSize, Format, Layout, Spec, double_quant};
use crate::{Error, Result};

/// The scales of a weight as stored, one per block.
#[derive(Debug, Clone, Copy)]
pub enum Scales<'a> {
    /// Floating-point numbers.
    Plain(Floats<'a>),
    /// Double-quantized.
    Double {
        /// An 8-bit code per block.
        codes: &'a [u8],
        /// A scale per 256 codes.
        scale_2: &'a [f32],
        /// Added to every scale.
        offset: f32,
    },
}

/// The scales of a weight that is being packed.
#[derive(Debug)]
pub enum ScalesMut<'a> {
    /// Floating-point numbers.
    Plain(FloatsMut<'a>),
    /// Double-quantized.
    Double {
        /// An 8-bit code per block.
        codes: &'a mut [u8],
        /// A scale per 256 codes.
        scale_2: &'a mut [f32],
        /// Added to every scale.
        offset: &'a mut f32,
    },
}

/// A packed `[rows, cols]` weight.
#[derive(Debug, Clone)]
pub struct PackedWeight<'a> {
    spec: Spec,
    layout: Layout,
    codes: &'a [u8],
    scales: Scales<'a>,
    shifts: Option<Floats<'a>>,
    codebook: Option<Codebook>,
}

/// The buffers that a weight is packed into.
#[derive(Debug)]
pub struct PackedWeightMut<'a> {
    /// How to pack.
    pub spec: Spec,
    /// The geometry under `spec`.
    pub layout: Layout,
    /// Packed codes.
    pub codes: &'a mut [u8],
    /// Scales, one per block.
    pub scales: ScalesMut<'a>,
    /// Shifts, one per block, where the format has them.
    pub shifts: Option<FloatsMut<'a>>,
    /// The table of a 4-bit format.
    pub codebook: Option<Codebook>,
}

/// Lengths and types of the buffers, to be held against a [`Spec`] and a [`Layout`].
pub(crate) struct Buffers {
    pub(crate) codes: usize,
    pub(crate) scales: usize,
    pub(crate) scale_dtype: Option<Dtype>,
    pub(crate) scale_2: Option<usize>,
    pub(crate) shifts: Option<(usize, Dtype)>,
}

impl Buffers {
    pub(crate) fn check(&self, spec: &Spec, layout: &Layout) -> Result<()> {
        expect("codes", self.codes, layout.code_bytes())?;
        expect("scale", self.scales, layout.block_count())?;
        if self.scale_2.is_some() != spec.double_quant {
            return Err(Error::invalid("scale_2", present(self.scale_2.is_some()), present(spec.double_quant)));
        }
        if let Some(count) = self.scale_2 {
            expect("scale_2", count, layout.block_count().div_ceil(double_quant::BLOCK))?;
        }
        if let Some(dtype) = self.scale_dtype.filter(|&dtype| dtype != spec.scale_dtype) {
            return Err(Error::invalid("scale", dtype.name(), spec.scale_dtype.name()));
        }
        if self.shifts.is_some() != spec.format.has_shift() {
            return Err(Error::invalid("shift", present(self.shifts.is_some()), present(spec.format.has_shift())));
        }
        if let Some((count, dtype)) = self.shifts {
            expect("shift", count, layout.block_count())?;
            if dtype != spec.scale_dtype {
                return Err(Error::invalid("shift", dtype.name(), spec.scale_dtype.name()));
            }
        }
        Ok(())
    }
}

fn expect(argument: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        Ok(())
    } else {
        Err(Error::invalid(argument, format!("{got} elements"), format!("{expected} elements")))
    }
}

fn present(is_present: bool) -> &'static str {
    if is_present { "a buffer" } else { "none" }
}

impl<'a> PackedWeight<'a> {
    /// Views of the buffers of a `[rows, cols]` weight; `codebook` is the table of a custom format.
    pub fn new(
        spec: Spec,
        (rows, cols): (usize, usize),
        codes: &'a [u8],
        scales: Scales<'a>,
        shifts: Option<Floats<'a>>,
        codebook: Option<&[f32]>,
    ) -> Result<Self> {
        let layout = Layout::new(&spec, rows, cols)?;
        let (scale_count, scale_dtype, scale_2) = match scales {
            Scales::Plain(floats) => (floats.len(), Some(floats.dtype()), None),
            Scales::Double { codes, scale_2, .. } => (codes.len(), None, Some(scale_2.len())),
        };
        let shift_buffer = shifts.map(|floats| (floats.len(), floats.dtype()));
        Buffers { codes: codes.len(), scales: scale_count, scale_dtype, scale_2, shifts: shift_buffer }
            .check(&spec, &layout)?;
        let codebook = spec.codebook(codebook)?;
        Ok(Self { spec, layout, codes, scales, shifts, codebook })
    }

    /// How the weight is packed.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Where its codes and scales lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Packed codes.
    pub fn codes(&self) -> &'a [u8] {
        self.codes
    }

    /// Whether codes are 8-bit integers with one scale for each row, as `LLM.int8()` has them.
    pub fn is_int8_by_rows(&self) -> bool {
        self.spec.format == Format::Int8 && self.spec.block_size == BlockSize::Row
    }

    /// The table of a 4-bit format; none for 8 bits.
    pub fn codebook(&self) -> Option<&Codebook> {
        self.codebook.as_ref()
    }

    /// Whether blocks have a shift.
    pub fn has_shift(&self) -> bool {
        self.shifts.is_some()
    }

    /// The scales as stored.
    pub fn scales(&self) -> Scales<'a> {
        self.scales
    }

    /// The shifts as stored, where the format has them.
    pub fn shifts(&self) -> Option<Floats<'a>> {
        self.shifts
    }

    /// The fp32 scale of a block.
    pub fn scale(&self, block: usize) -> f32 {
        match self.scales {
            Scales::Plain(floats) => floats.get(block),
            Scales::Double { codes, scale_2, offset } => {
                double_quant::restore(codes[block], scale_2[block / double_quant::BLOCK], offset)
            }
        }
    }

    /// The fp32 shift of a block, 0 where the format has none.
    pub fn shift(&self, block: usize) -> f32 {
        self.shifts.map_or(0.0, |floats| floats.get(block))
    }
}

impl<'a> PackedWeightMut<'a> {
    /// Buffers for a `[rows, cols]` weight; `codebook` is the table of a custom format.
    pub fn new(
        spec: Spec,
        (rows, cols): (usize, usize),
        codes: &'a mut [u8],
        scales: ScalesMut<'a>,
        shifts: Option<FloatsMut<'a>>,
        codebook: Option<&[f32]>,
    ) -> Result<Self> {
        let layout = Layout::new(&spec, rows, cols)?;
        let (scale_count, scale_dtype, scale_2) = match &scales {
            ScalesMut::Plain(floats) => (floats.len(), Some(floats.dtype()), None),
            ScalesMut::Double { codes, scale_2, .. } => (codes.len(), None, Some(scale_2.len())),
        };
        let shift_buffer = shifts.as_ref().map(|floats| (floats.len(), floats.dtype()));
        Buffers { codes: codes.len(), scales: scale_count, scale_dtype, scale_2, shifts: shift_buffer }
            .check(&spec, &layout)?;
        let codebook = spec.codebook(codebook)?;
        Ok(Self { spec, layout, codes, scales, shifts, codebook })
    }
}
