//! `Spec` and `Layout` in Python.

use lowbit_core::dtype::Dtype;
use lowbit_core::format::{BlockOrder, BlockSize, Format, Layout, Spec};
use lowbit_core::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::errors::to_python;

/// What `block_size` takes in Python.
#[derive(FromPyObject, IntoPyObject)]
pub(crate) enum BlockSizeArgument {
    #[pyo3(transparent)]
    Elements(i64),
    #[pyo3(transparent)]
    Name(String),
}

impl BlockSizeArgument {
    fn parse(self) -> Result<BlockSize> {
        match self {
            Self::Name(name) if name == "row" => Ok(BlockSize::Row),
            Self::Name(name) => {
                Err(Error::invalid("block_size", format!("{name:?}"), "a power of two from 16 to 4096, or \"row\""))
            }
            // A negative size is no power of two either; its own text names it.
            Self::Elements(size) => usize::try_from(size).map_or_else(
                |_| Err(Error::invalid("block_size", size, "a power of two from 16 to 4096, or \"row\"")),
                BlockSize::elements,
            ),
        }
    }
}

/// How a weight is packed: everything but its shape.
#[pyclass(name = "Spec", module = "lowbit_rs._native", frozen, eq, hash)]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct PySpec(pub(crate) Spec);

#[pymethods]
impl PySpec {
    #[new]
    #[pyo3(signature = (format, block_size=BlockSizeArgument::Elements(64), *, block_order="row",
                        scale_dtype="float32", double_quant=false, signed_absmax=false))]
    fn new(
        format: &str,
        block_size: BlockSizeArgument,
        block_order: &str,
        scale_dtype: &str,
        double_quant: bool,
        signed_absmax: bool,
    ) -> PyResult<Self> {
        let parse = || {
            let spec = Spec {
                format: Format::parse(format)?,
                block_size: block_size.parse()?,
                block_order: BlockOrder::parse(block_order)?,
                scale_dtype: Dtype::parse("scale_dtype", scale_dtype)?,
                double_quant,
                signed_absmax,
            };
            spec.validate().map(|()| spec)
        };
        parse().map(Self).map_err(|error| to_python(&error))
    }

    /// The name of the code values: nf4, fp4, int4, uint4, int8, uint8 or custom.
    #[getter]
    fn format(&self) -> &'static str {
        self.0.format.name()
    }

    /// Weights that share a scale, or "row".
    #[getter]
    fn block_size(&self) -> BlockSizeArgument {
        match self.0.block_size {
            BlockSize::Elements(size) => BlockSizeArgument::Elements(size as i64),
            BlockSize::Row => BlockSizeArgument::Name("row".to_owned()),
        }
    }

    /// "row", or "flat" for blocks that run through the flattened matrix.
    #[getter]
    fn block_order(&self) -> &'static str {
        self.0.block_order.name()
    }

    /// Storage of scales and shifts; with double quantization of shifts alone.
    #[getter]
    fn scale_dtype(&self) -> &'static str {
        self.0.scale_dtype.name()
    }

    /// Whether scales are stored as 8-bit codes.
    #[getter]
    fn double_quant(&self) -> bool {
        self.0.double_quant
    }

    /// Whether a scale carries the sign of its block's largest weight.
    #[getter]
    fn signed_absmax(&self) -> bool {
        self.0.signed_absmax
    }

    /// Bits of a code, 4 or 8.
    #[getter]
    fn bits(&self) -> usize {
        self.0.format.bits()
    }

    /// Whether blocks have a shift beside the scale.
    #[getter]
    fn has_shift(&self) -> bool {
        self.0.format.has_shift()
    }

    /// The geometry of a [rows, cols] weight.
    fn layout(&self, rows: usize, cols: usize) -> PyResult<PyLayout> {
        Layout::new(&self.0, rows, cols).map(PyLayout).map_err(|error| to_python(&error))
    }

    fn __repr__(&self) -> String {
        let block_size = match self.0.block_size {
            BlockSize::Elements(size) => size.to_string(),
            BlockSize::Row => "'row'".to_owned(),
        };
        let python_bool = |flag: bool| if flag { "True" } else { "False" };
        format!(
            "Spec('{}', {block_size}, block_order='{}', scale_dtype='{}', double_quant={}, signed_absmax={})",
            self.format(),
            self.block_order(),
            self.scale_dtype(),
            python_bool(self.0.double_quant),
            python_bool(self.0.signed_absmax),
        )
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let positional = (self.format(), self.block_size()).into_pyobject(py)?;
        let named = PyDict::new(py);
        named.set_item("block_order", self.block_order())?;
        named.set_item("scale_dtype", self.scale_dtype())?;
        named.set_item("double_quant", self.0.double_quant)?;
        named.set_item("signed_absmax", self.0.signed_absmax)?;
        Ok((positional, named))
    }
}

/// Where the codes and scales of a weight lie.
#[pyclass(name = "Layout", module = "lowbit_rs._native", frozen)]
pub(crate) struct PyLayout(Layout);

#[pymethods]
impl PyLayout {
    /// Rows of the matrix.
    #[getter]
    fn rows(&self) -> usize {
        self.0.rows
    }

    /// Columns of the matrix.
    #[getter]
    fn cols(&self) -> usize {
        self.0.cols
    }

    /// Bytes of one row's codes; meaningless where blocks straddle rows.
    #[getter]
    fn row_bytes(&self) -> usize {
        self.0.row_bytes()
    }

    /// Bytes of all codes.
    #[getter]
    fn code_bytes(&self) -> usize {
        self.0.code_bytes()
    }

    /// Blocks in a row; meaningless where blocks straddle rows.
    #[getter]
    fn blocks_per_row(&self) -> usize {
        self.0.blocks_per_row()
    }

    /// Number of scales.
    #[getter]
    fn block_count(&self) -> usize {
        self.0.block_count()
    }

    /// Whether blocks run across the ends of rows.
    #[getter]
    fn straddles_rows(&self) -> bool {
        self.0.straddles_rows
    }
}
