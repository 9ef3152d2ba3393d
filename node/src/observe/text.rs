//! Readings as OpenMetrics text, for `/metrics`.

use std::fmt::{self, Write as _};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{self, Registry},
};

use super::readings::{Figure, Point, Reading, Unit};

/// Upper bounds in seconds, from half a millisecond.
const BUCKETS: [f64; 14] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// All readings, in their order.
pub(crate) fn render(readings: Vec<Reading>) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Readings(readings)));
    let mut text = String::new();
    if encode(&mut text, &registry).is_err() {
        let _ = writeln!(text, "# encoding failed");
    }
    text
}

/// OpenTelemetry's names, as Prometheus has them.
fn plain(name: &str) -> String {
    name.replace('.', "_")
}

#[derive(Debug)]
struct Readings(Vec<Reading>);

impl Collector for Readings {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        for Reading { name, help, unit, points } in &self.0 {
            let Some(first) = points.first() else { continue };
            let unit = match unit {
                Unit::Things => None,
                Unit::Seconds => Some(registry::Unit::Seconds),
                Unit::Bytes => Some(registry::Unit::Bytes),
            };
            let kind = match first.value {
                Figure::Total(_) => MetricType::Counter,
                Figure::Level(_) => MetricType::Gauge,
                Figure::Times(_) => MetricType::Histogram,
            };
            let name = plain(name);
            let mut metric = encoder.encode_descriptor(&name, help, unit.as_ref(), kind)?;
            if first.labels.is_empty() {
                put(&first.value, metric)?;
                continue;
            }
            for Point { labels, value } in points {
                let labels: Vec<_> = labels.iter().map(|(label, value)| (plain(label), value.as_str())).collect();
                put(value, metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

fn put(figure: &Figure, mut encoder: MetricEncoder<'_>) -> fmt::Result {
    match figure {
        Figure::Total(total) => ConstCounter::new(*total).encode(encoder),
        Figure::Level(level) => ConstGauge::new(*level).encode(encoder),
        Figure::Times(times) => {
            encoder.encode_histogram::<NoLabelSet>(times.sum_s(), times.count(), &times.in_buckets(&BUCKETS), None)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::observe::distribution::Distribution;

    #[test]
    fn readings_have_the_names_that_prometheus_gives_them() {
        let mut times = Distribution::default();
        times.add(Duration::from_micros(700));
        let labels = vec![("service", "a\"b".to_string()), ("http.request.method", "GET".into())];
        let text = render(vec![
            Reading {
                name: "http.server.request.duration",
                help: "Calls",
                unit: Unit::Seconds,
                points: vec![Point { labels: labels.clone(), value: Figure::Times(times) }],
            },
            Reading {
                name: "starling.retries",
                help: "Retries",
                unit: Unit::Things,
                points: vec![Point { labels: Vec::new(), value: Figure::Total(3) }],
            },
            Reading { name: "starling.nothing", help: "Nothing", unit: Unit::Things, points: Vec::new() },
        ]);
        let labels = r#"service="a\"b",http_request_method="GET""#;
        for line in [
            "# TYPE http_server_request_duration_seconds histogram",
            &format!("http_server_request_duration_seconds_count{{{labels}}} 1"),
            &format!("http_server_request_duration_seconds_bucket{{le=\"0.0005\",{labels}}} 0"),
            &format!("http_server_request_duration_seconds_bucket{{le=\"0.001\",{labels}}} 1"),
            &format!("http_server_request_duration_seconds_bucket{{le=\"+Inf\",{labels}}} 1"),
            "starling_retries_total 3",
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
        }
        assert!(!text.contains("nothing"), "{text}");
    }
}
