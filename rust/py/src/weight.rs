//! `WeightView`: the buffers of one weight, lent by Python for the length of a call.

use lowbit_core::format::{Layout, Spec};
use lowbit_core::storage::{PackedWeight, PackedWeightMut, Scales, ScalesMut};
use lowbit_core::{Error, Result};
use pyo3::prelude::*;

use crate::buffers::{Buffer, floats, floats_mut, slice, slice_mut};
use crate::errors::to_python;
use crate::spec::PySpec;

/// Addresses of the tensors of a packed [rows, cols] weight. It borrows: the caller keeps the tensors alive, and lets
/// nobody change them, while a call uses it. Lengths are checked against spec and shape when it is made.
#[pyclass(module = "lowbit_rs._native", frozen)]
pub(crate) struct WeightView {
    spec: Spec,
    shape: (usize, usize),
    codes: Buffer,
    scale: Buffer,
    scale_2: Option<Buffer>,
    scale_offset: Option<Buffer>,
    shift: Option<Buffer>,
    codebook: Option<Buffer>,
}

#[pymethods]
impl WeightView {
    #[new]
    #[allow(clippy::too_many_arguments)] // one for each tensor of a weight
    #[pyo3(signature = (spec, rows, cols, codes, scale, scale_2=None, scale_offset=None, shift=None, codebook=None))]
    fn new(
        spec: &PySpec,
        rows: usize,
        cols: usize,
        codes: Buffer,
        scale: Buffer,
        scale_2: Option<Buffer>,
        scale_offset: Option<Buffer>,
        shift: Option<Buffer>,
        codebook: Option<Buffer>,
    ) -> PyResult<Self> {
        let view = Self { spec: spec.0, shape: (rows, cols), codes, scale, scale_2, scale_offset, shift, codebook };
        // SAFETY: the caller lends the tensors for the view's life.
        unsafe { view.packed() }.map_err(|error| to_python(&error))?;
        Ok(view)
    }

    /// Rows of the matrix.
    #[getter]
    fn rows(&self) -> usize {
        self.shape.0
    }

    /// Columns of the matrix.
    #[getter]
    fn cols(&self) -> usize {
        self.shape.1
    }
}

impl WeightView {
    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Second-level scales and offset, both or neither.
    fn double_quant(&self) -> Result<Option<(Buffer, Buffer)>> {
        match (self.scale_2, self.scale_offset) {
            (Some(scale_2), Some(offset)) if offset.1 == 1 => Ok(Some((scale_2, offset))),
            (Some(_), Some(offset)) => {
                Err(Error::invalid("scale_offset", format!("{} elements", offset.1), "1 element"))
            }
            (None, None) => Ok(None),
            (Some(_), None) => Err(Error::invalid("scale_offset", "none", "a buffer, since there is scale_2")),
            (None, Some(_)) => Err(Error::invalid("scale_offset", "a buffer", "none, since there is no scale_2")),
        }
    }

    fn codebook(&self) -> Result<Option<&[f32]>> {
        // SAFETY: the caller lends the tensor for the view's life.
        self.codebook.map(|buffer| unsafe { slice(buffer) }).transpose()
    }

    /// The weight, to be read.
    ///
    /// # Safety
    /// The lent tensors are alive and nobody writes to them while the result lives.
    pub(crate) unsafe fn packed(&self) -> Result<PackedWeight<'_>> {
        let dtype = self.spec.scale_dtype;
        // SAFETY: handed on to the caller.
        unsafe {
            let scales = match self.double_quant()? {
                Some((scale_2, offset)) => {
                    Scales::Double { codes: slice(self.scale)?, scale_2: slice(scale_2)?, offset: slice(offset)?[0] }
                }
                None => Scales::Plain(floats(self.scale, dtype)?),
            };
            let shifts = self.shift.map(|buffer| floats(buffer, dtype)).transpose()?;
            PackedWeight::new(self.spec, self.shape, slice(self.codes)?, scales, shifts, self.codebook()?)
        }
    }

    /// The weight, to be written.
    ///
    /// # Safety
    /// The lent tensors are alive and nobody else uses them while the result lives.
    pub(crate) unsafe fn packed_mut(&self) -> Result<PackedWeightMut<'_>> {
        let dtype = self.spec.scale_dtype;
        // SAFETY: handed on to the caller.
        unsafe {
            let scales = match self.double_quant()? {
                Some((scale_2, offset)) => ScalesMut::Double {
                    codes: slice_mut(self.scale)?,
                    scale_2: slice_mut(scale_2)?,
                    offset: &mut slice_mut(offset)?[0],
                },
                None => ScalesMut::Plain(floats_mut(self.scale, dtype)?),
            };
            let shifts = self.shift.map(|buffer| floats_mut(buffer, dtype)).transpose()?;
            PackedWeightMut::new(self.spec, self.shape, slice_mut(self.codes)?, scales, shifts, self.codebook()?)
        }
    }

    /// Its geometry, known to be valid.
    pub(crate) fn layout(&self) -> Result<Layout> {
        Layout::new(&self.spec, self.shape.0, self.shape.1)
    }
}
