//! What the suites share: weights that own their buffers, every instruction set in turn, and strategies.
#![allow(dead_code, unreachable_pub)] // each suite uses its part

use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};
use lowbit_core::Result;
use lowbit_core::cpu::{self, Isa, NonFinite, Source};
use lowbit_core::dtype::{Dtype, Element, Floats, FloatsMut};
use lowbit_core::format::{BlockOrder, BlockSize, Format, Layout, Spec, double_quant};
use lowbit_core::storage::{PackedWeight, PackedWeightMut, Scales, ScalesMut};
use proptest::prelude::*;

/// Runs `check` on every instruction set of the machine. They are forced process-wide, so suites take turns.
pub fn on_every_isa<E>(mut check: impl FnMut(Isa) -> std::result::Result<(), E>) -> std::result::Result<(), E> {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let outcome = Isa::available().into_iter().try_for_each(|isa| {
        Isa::force(Some(isa));
        check(isa)
    });
    Isa::force(None);
    outcome
}

/// `cases` cases a property; a failure prints its seed and leaves no file.
pub fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

/// Floats of a dtype known at run time.
#[derive(Debug, Clone, PartialEq)]
pub enum Vector {
    Float32(Vec<f32>),
    Float16(Vec<f16>),
    Bfloat16(Vec<bf16>),
}

impl Vector {
    pub fn from_f32(dtype: Dtype, values: &[f32]) -> Self {
        match dtype {
            Dtype::Float32 => Self::Float32(values.to_vec()),
            Dtype::Float16 => Self::Float16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            Dtype::Bfloat16 => Self::Bfloat16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
        }
    }

    pub fn zeros(dtype: Dtype, len: usize) -> Self {
        Self::from_f32(dtype, &vec![0.0; len])
    }

    pub fn to_f32(&self) -> Vec<f32> {
        let floats = self.floats();
        (0..floats.len()).map(|i| floats.get(i)).collect()
    }

    pub fn floats(&self) -> Floats<'_> {
        match self {
            Self::Float32(v) => Floats::Float32(v),
            Self::Float16(v) => Floats::Float16(v),
            Self::Bfloat16(v) => Floats::Bfloat16(v),
        }
    }

    pub fn floats_mut(&mut self) -> FloatsMut<'_> {
        match self {
            Self::Float32(v) => FloatsMut::Float32(v),
            Self::Float16(v) => FloatsMut::Float16(v),
            Self::Bfloat16(v) => FloatsMut::Bfloat16(v),
        }
    }
}

/// `value` rounded to `dtype`.
pub fn round_to(dtype: Dtype, value: f32) -> f32 {
    Vector::from_f32(dtype, &[value]).to_f32()[0]
}

/// A packed weight with its memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Owned {
    pub spec: Spec,
    pub rows: usize,
    pub cols: usize,
    pub codes: Vec<u8>,
    pub scales: Vector,
    pub scale_codes: Vec<u8>,
    pub scale_2: Vec<f32>,
    pub offset: f32,
    pub shifts: Option<Vector>,
    pub table: Option<Vec<f32>>,
}

impl Owned {
    pub fn quantize(weights: &Vector, rows: usize, cols: usize, spec: Spec, table: Option<&[f32]>) -> Result<Self> {
        let strides = [0, cols as isize, 1];
        Self::quantize_strided(weights, [1, rows, cols], strides, spec, table, NonFinite::Error)
    }

    pub fn quantize_strided(
        weights: &Vector,
        shape: [usize; 3],
        strides: [isize; 3],
        spec: Spec,
        table: Option<&[f32]>,
        nonfinite: NonFinite,
    ) -> Result<Self> {
        let (rows, cols) = (shape[0] * shape[1], shape[2]);
        let layout = Layout::new(&spec, rows, cols)?;
        let blocks = layout.block_count();
        let mut out = Self {
            spec,
            rows,
            cols,
            codes: vec![0xee; layout.code_bytes()],
            scales: Vector::zeros(spec.scale_dtype, if spec.double_quant { 0 } else { blocks }),
            scale_codes: vec![0; if spec.double_quant { blocks } else { 0 }],
            scale_2: vec![0.0; if spec.double_quant { blocks.div_ceil(double_quant::BLOCK) } else { 0 }],
            offset: 0.0,
            shifts: spec.format.has_shift().then(|| Vector::zeros(spec.scale_dtype, blocks)),
            table: table.map(<[f32]>::to_vec),
        };
        let scales = if spec.double_quant {
            ScalesMut::Double { codes: &mut out.scale_codes, scale_2: &mut out.scale_2, offset: &mut out.offset }
        } else {
            ScalesMut::Plain(out.scales.floats_mut())
        };
        let shifts = out.shifts.as_mut().map(Vector::floats_mut);
        let view = PackedWeightMut::new(spec, (rows, cols), &mut out.codes, scales, shifts, table)?;
        match weights {
            Vector::Float32(v) => cpu::quantize(source(v, shape, strides), view, nonfinite, 2),
            Vector::Float16(v) => cpu::quantize(source(v, shape, strides), view, nonfinite, 2),
            Vector::Bfloat16(v) => cpu::quantize(source(v, shape, strides), view, nonfinite, 2),
        }?;
        Ok(out)
    }

    pub fn view(&self) -> PackedWeight<'_> {
        let scales = if self.spec.double_quant {
            Scales::Double { codes: &self.scale_codes, scale_2: &self.scale_2, offset: self.offset }
        } else {
            Scales::Plain(self.scales.floats())
        };
        let shifts = self.shifts.as_ref().map(Vector::floats);
        let shape = (self.rows, self.cols);
        PackedWeight::new(self.spec, shape, &self.codes, scales, shifts, self.table.as_deref())
            .expect("its own buffers")
    }

    pub fn dequantize(&self, dtype: Dtype) -> Vector {
        let mut out = Vector::zeros(dtype, self.rows * self.cols);
        cpu::dequantize(&self.view(), out.floats_mut(), 2).expect("its own buffers");
        out
    }

    /// The fp32 scale of every block.
    pub fn block_scales(&self) -> Vec<f32> {
        let view = self.view();
        (0..view.layout().block_count()).map(|block| view.scale(block)).collect()
    }

    /// The fp32 shift of every block, 0 where the format has none.
    pub fn block_shifts(&self) -> Vec<f32> {
        let view = self.view();
        (0..view.layout().block_count()).map(|block| view.shift(block)).collect()
    }
}

fn source<T: Element>(values: &[T], shape: [usize; 3], strides: [isize; 3]) -> Source<T> {
    let reach: isize = shape.iter().zip(strides).map(|(&n, stride)| (n as isize - 1).max(0) * stride).sum();
    assert!(shape.contains(&0) || reach < values.len() as isize, "the view lies within the values");
    // SAFETY: as just asserted, and nobody writes to the values.
    unsafe { Source::new(values.as_ptr(), shape, strides) }
}

/// A signed table (BOF4-S-like), a lopsided short one, and one that is not sorted.
pub const TABLES: [&[f32]; 3] = [
    &[-0.8, -0.62, -0.47, -0.34, -0.22, -0.11, 0.0, 0.08, 0.17, 0.26, 0.36, 0.47, 0.6, 0.74, 0.87, 1.0],
    &[-1.0, -0.2, 0.0, 0.3, 1.0],
    &[1.0, -1.0, 0.5, 0.0, -0.5, 0.25, -0.25],
];

pub fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(&Dtype::ALL[..])
}

/// Every format with every block size, order and scale storage.
pub fn specs() -> impl Strategy<Value = (Spec, Option<&'static [f32]>)> {
    let size = prop_oneof![
        4 => prop::sample::select(vec![16_usize, 32, 64, 128, 256]).prop_map(BlockSize::Elements),
        1 => prop::sample::select(vec![512_usize, 1024, 2048, 4096]).prop_map(BlockSize::Elements),
        1 => Just(BlockSize::Row),
    ];
    let format = prop::sample::select(&Format::ALL[..]);
    (format, size, any::<bool>(), dtypes(), any::<bool>(), prop::sample::select(&TABLES[..])).prop_map(
        |(format, block_size, is_flat, scale_dtype, double_quant, table)| {
            let is_flat = is_flat && block_size != BlockSize::Row;
            let table = (format == Format::Custom).then_some(table);
            let spec = Spec {
                format,
                block_size,
                block_order: if is_flat { BlockOrder::Flat } else { BlockOrder::Row },
                scale_dtype,
                double_quant,
                signed_absmax: table.is_some_and(|table| table == TABLES[0]),
            };
            (spec, table)
        },
    )
}

/// Rows and columns that are multiples of nothing, and some that are.
pub fn shapes() -> impl Strategy<Value = (usize, usize)> {
    let cols = prop_oneof![
        3 => 1_usize..300,
        2 => prop::sample::select(vec![64_usize, 127, 128, 129, 192, 255, 256, 512, 513, 640, 1111]),
        1 => 4000_usize..4200,
    ];
    (1_usize..70, cols).prop_map(|(rows, cols)| if cols > 1000 { (rows % 9 + 1, cols) } else { (rows, cols) })
}

/// Normal-like numbers, with a scale that varies by block of 16 and now and then a zero run or a giant.
pub fn weights(count: usize, seed: u64, magnitude: f32) -> Vec<f32> {
    let mut state = seed | 1;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 + 0.5) / (1 << 24) as f32
    };
    let mut scale = 1.0;
    (0..count)
        .map(|i| {
            if i % 16 == 0 {
                let dice = uniform();
                scale = if dice < 0.05 { 0.0 } else { 10.0_f32.powf(4.0 * uniform() - 3.0) };
            }
            let normal = (0..4).map(|_| uniform()).sum::<f32>() - 2.0;
            normal * scale * magnitude
        })
        .collect()
}
