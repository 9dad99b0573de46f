//! Results as pictures.

use std::path::Path;

use anyhow::Result;
use plotters::{
    coord::Shift,
    prelude::{
        BLACK, ChartBuilder, Color, DrawingArea, IntoDrawingArea, IntoLogRange, LineSeries,
        Palette, Palette99, PathElement, Rectangle, SVGBackend, WHITE,
    },
};

use super::{
    conclusions::{Group, run_lengths},
    results::Results,
    systems::System,
    workloads::Workload,
};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const SIZE: (u32, u32) = (860, 420);
const FONT: (&str, u32) = ("sans-serif", 15);
const MIB: f64 = (1 << 20) as f64;

/// Draws all of them into `directory`.
pub(super) fn draw(results: &Results, directory: &Path) -> Result<()> {
    let groups = results.groups();
    let systems = |workload| -> Vec<(System, &Group<'_>)> {
        let of = groups.iter().filter(|((of, _), _)| *of == workload);
        of.map(|((_, system), group)| (*system, group)).collect()
    };
    let mut workloads: Vec<_> = groups.keys().map(|(workload, _)| *workload).collect();
    workloads.dedup();
    for workload in workloads {
        let systems = systems(workload);
        if systems.len() > 1 {
            let name = file_name(workload);
            let title = format!("Memory saved, {workload}");
            savings(
                &systems,
                &title,
                &directory.join(format!("savings-{name}.svg")),
            )?;
            let title = format!("CPU seconds for each GiB saved, {workload}");
            cpu(&systems, &title, &directory.join(format!("cpu-{name}.svg")))?;
        }
    }
    let sizes: Vec<_> = groups
        .iter()
        .filter_map(|((workload, system), group)| match (workload, system) {
            (Workload::Files { mib }, System::Readonly) => Some((f64::from(*mib), group)),
            _ => None,
        })
        .collect();
    if sizes.len() > 1 {
        growth(
            &sizes,
            &directory.join("growth.svg"),
            "MiB of files in each of two guests",
        )?;
    }
    let guests: Vec<_> = groups
        .iter()
        .filter_map(|((workload, system), group)| match (workload, system) {
            (Workload::Boot { guests }, System::Readonly) => Some((f64::from(*guests), group)),
            _ => None,
        })
        .collect();
    if guests.len() > 1 {
        growth(
            &guests,
            &directory.join("growth-guests.svg"),
            "Debian guests",
        )?;
    }
    let lengths = run_lengths(&groups);
    if lengths.len() > 1 {
        runs(&lengths, &directory.join("run-lengths.svg"))?;
    }
    Ok(())
}

fn file_name(workload: Workload) -> String {
    match workload {
        Workload::Files { mib } => format!("files-{mib}"),
        Workload::Boot { guests } => format!("boot-{guests}"),
        Workload::Aged => "aged".to_owned(),
        Workload::Mixed => "mixed".to_owned(),
        Workload::Apart => "apart".to_owned(),
    }
}

/// What was saved when, on a logarithmic axis: they differ by orders of magnitude.
fn savings(systems: &[(System, &Group<'_>)], title: &str, path: &Path) -> Result<()> {
    let root = area(path)?;
    // The run in the middle, by what was saved.
    let typical = |group: &Group<'_>| {
        let mut runs = group.runs.clone();
        runs.sort_by_key(|run| run.saved);
        runs[runs.len() / 2].clone()
    };
    let chosen: Vec<_> = systems
        .iter()
        .filter(|(system, _)| *system != System::Nothing)
        .map(|(system, group)| (*system, typical(group)))
        .collect();
    let points = || chosen.iter().flat_map(|(_, run)| &run.series);
    let last = points().map(|(at, _)| *at).fold(1.0, f64::max);
    let most = points()
        .map(|(_, saved)| *saved as f64 / MIB)
        .fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, FONT)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((0.05..last * 1.3).log_scale(), 0.0..most * 1.08)?;
    chart
        .configure_mesh()
        .x_desc("seconds since sharing was switched on")
        .y_desc("MiB")
        .draw()?;
    for (index, (system, run)) in chosen.iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        let end = run.series.last().map(|(_, saved)| (last * 1.3, *saved));
        let line = run
            .series
            .iter()
            .copied()
            .filter(|(at, _)| *at > 0.05)
            .chain(end)
            .map(|(at, saved)| (at, saved as f64 / MIB));
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)))?
            .label(plain(*system))
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE.mix(0.8))
        .position(plotters::chart::SeriesLabelPosition::UpperLeft)
        .draw()?;
    Ok(root.present()?)
}

/// The host's part and the guests' upon it.
fn cpu(systems: &[(System, &Group<'_>)], title: &str, path: &Path) -> Result<()> {
    let root = area(path)?;
    let bars: Vec<_> = systems
        .iter()
        .filter_map(|(system, group)| {
            let all = group.cpu_per_gib()?.median;
            let host = group.host_cpu_per_gib()?.median;
            (*system != System::Nothing).then_some((*system, host, all))
        })
        .collect();
    let most = bars.iter().map(|(_, _, all)| *all).fold(0.1, f64::max);
    let names: Vec<_> = bars.iter().map(|(system, ..)| plain(*system)).collect();
    let mut chart = ChartBuilder::on(&root)
        .caption(title, FONT)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(230)
        .build_cartesian_2d(0.0..most * 1.15, -0.5..bars.len() as f64 - 0.5)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_desc("seconds; dark the host's, light the guests' instructions as nanoseconds")
        .y_labels(bars.len())
        .y_label_formatter(&|y: &f64| {
            let index = y.round();
            let exact = (y - index).abs() < 0.01 && index >= 0.0;
            let name = exact.then(|| names.get(index as usize)).flatten();
            name.cloned().unwrap_or_default()
        })
        .draw()?;
    for (index, (_, host, all)) in bars.iter().enumerate() {
        let (bottom, top) = (index as f64 - 0.3, index as f64 + 0.3);
        let colour = Palette99::pick(index).to_rgba();
        let bar = |from, to, colour: plotters::style::RGBAColor| {
            Rectangle::new([(from, bottom), (to, top)], colour.filled())
        };
        chart.draw_series([bar(0.0, *host, colour), bar(*host, *all, colour.mix(0.4))])?;
    }
    Ok(root.present()?)
}

/// Time and CPU time for each page, of sizes that are powers of two.
fn growth(sizes: &[(f64, &Group<'_>)], path: &Path, of: &str) -> Result<()> {
    let root = area(path)?;
    let line = |value: fn(&super::results::Run) -> Option<f64>| -> Vec<(f64, f64)> {
        let point = |(size, group): &(f64, &Group<'_>)| {
            let spread = group.spread(|run| Some(value(run)? * 1e6 / (run.bytes() / 4096.0)));
            Some((size.log2(), spread?.median))
        };
        sizes.iter().filter_map(point).collect()
    };
    let lines = [
        ("time to 99%", line(|run| run.seconds_to.map(|to| to[2]))),
        (
            "the host's CPU time",
            line(|run| Some(run.host_seconds_to_99)),
        ),
    ];
    let most = lines
        .iter()
        .flat_map(|(_, line)| line)
        .map(|(_, value)| *value)
        .fold(1.0, f64::max);
    let (first, last) = (sizes[0].0.log2(), sizes[sizes.len() - 1].0.log2());
    let mut chart = ChartBuilder::on(&root)
        .caption("pagefusion, for each page saved", FONT)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(first - 0.2..last + 0.2, 0.0..most * 1.2)?;
    chart
        .configure_mesh()
        .x_desc(of)
        .x_labels((last - first) as usize + 1)
        .x_label_formatter(&|x: &f64| format!("{:.0}", x.exp2()))
        .y_desc("µs")
        .draw()?;
    for (index, (name, line)) in lines.into_iter().enumerate() {
        let colour = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)).point_size(4))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(root.present()?)
}

/// How many of the pages lie in runs of at least so many.
fn runs(workloads: &[(String, Vec<Vec<u64>>)], path: &Path) -> Result<()> {
    let root = area(path)?;
    let classes = workloads.iter().flat_map(|(_, runs)| runs);
    let most = classes.map(Vec::len).max().unwrap_or(1);
    let last = f64::from(1_u32 << most.min(20));
    let mut chart = ChartBuilder::on(&root)
        .caption("Pages of mapped files in runs of at least so many", FONT)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((1.0..last).log_scale(), 0.0..105.0)?;
    chart
        .configure_mesh()
        .x_desc("pages that follow each other in a guest's memory")
        .y_desc("%")
        .draw()?;
    for (index, (name, runs)) in workloads.iter().enumerate() {
        // All runs together.
        let pages =
            |from: usize| -> u64 { runs.iter().flat_map(|run| run.iter().skip(from)).sum() };
        let line = (0..=most).map(|class| {
            let part = pages(class) as f64 / pages(0).max(1) as f64;
            (f64::from(1_u32 << class.min(20)), part * 100.0)
        });
        let colour = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(line, colour.stroke_width(2)).point_size(3))?
            .label(name.as_str())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .border_style(BLACK.mix(0.3))
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(root.present()?)
}

fn area(path: &Path) -> Result<Area<'_>> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    Ok(root)
}

fn plain(system: System) -> String {
    system.name().replace('`', "")
}
