//! Spans and readings as OTLP has them (opentelemetry-proto 1.x).

use std::time::SystemTime;

use opentelemetry_proto::tonic::{
    collector::{
        metrics::v1::ExportMetricsServiceRequest,
        trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse},
    },
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    metrics::v1::{
        AggregationTemporality, ExponentialHistogram, ExponentialHistogramDataPoint, Gauge, Metric, NumberDataPoint,
        ResourceMetrics, ScopeMetrics, Sum, exponential_histogram_data_point::Buckets, metric::Data, number_data_point,
    },
    resource::v1 as proto,
    trace::v1::{ResourceSpans, ScopeSpans, Span as ProtoSpan, Status, span, status::StatusCode},
};
use prost::Message;

use crate::observe::{
    distribution::SCALE,
    readings::{Figure, Point, Reading, Unit},
    trace::{Span, SpanKind, Value},
};

/// Who exports.
#[derive(Debug, Clone)]
pub(crate) struct Resource(proto::Resource);

impl Resource {
    /// A node, by mesh and name.
    pub(crate) fn of(mesh: &str, node: &str, zone: &str) -> Self {
        let mut attributes = vec![
            text("service.name", "starling"),
            text("service.namespace", mesh),
            text("service.instance.id", node),
            text("service.version", env!("CARGO_PKG_VERSION")),
        ];
        if !zone.is_empty() {
            attributes.push(text("cloud.availability_zone", zone));
        }
        Self(proto::Resource { attributes, ..Default::default() })
    }
}

fn attribute(key: &str, value: any_value::Value) -> KeyValue {
    KeyValue { key: key.into(), value: Some(AnyValue { value: Some(value) }), ..Default::default() }
}

fn text(key: &str, value: &str) -> KeyValue {
    attribute(key, any_value::Value::StringValue(value.into()))
}

fn scope() -> Option<InstrumentationScope> {
    Some(InstrumentationScope {
        name: "starling".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    })
}

fn nanoseconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

pub(super) fn traces(resource: &Resource, spans: impl Iterator<Item = Span>) -> ExportTraceServiceRequest {
    let spans = ScopeSpans { scope: scope(), spans: spans.map(of_span).collect(), ..Default::default() };
    let all = ResourceSpans { resource: Some(resource.0.clone()), scope_spans: vec![spans], ..Default::default() };
    ExportTraceServiceRequest { resource_spans: vec![all] }
}

/// How many spans the collector says it did not take, though it answered with a success.
pub(super) fn rejected_spans(answer: &[u8]) -> u64 {
    let answer = ExportTraceServiceResponse::decode(answer).unwrap_or_default();
    answer.partial_success.map_or(0, |partial| partial.rejected_spans.max(0) as u64)
}

fn of_span(span: Span) -> ProtoSpan {
    let status =
        span.error.as_ref().map(|(_, message)| Status { message: message.clone(), code: StatusCode::Error.into() });
    let failed = span.error.as_ref().map(|(why, _)| text("error.type", why));
    let told = span.attributes.iter().map(|(key, value)| {
        let value = match value {
            Value::Text(text) => any_value::Value::StringValue(text.to_string()),
            Value::Number(number) => any_value::Value::IntValue(*number),
        };
        attribute(key, value)
    });
    let link = span.link.map(|outside| {
        let (trace_id, span_id) = outside.ids();
        span::Link { trace_id: trace_id.into(), span_id: span_id.into(), ..Default::default() }
    });
    let (trace_id, span_id) = span.context.ids();
    ProtoSpan {
        trace_id: trace_id.into(),
        span_id: span_id.into(),
        parent_span_id: span.parent.map_or_else(Vec::new, |parent| parent.into()),
        trace_state: span.state.unwrap_or_default(),
        flags: span.context.flags().into(),
        name: span.name,
        kind: match span.kind {
            SpanKind::Server => span::SpanKind::Server,
            SpanKind::Client => span::SpanKind::Client,
        }
        .into(),
        start_time_unix_nano: nanoseconds(span.begun),
        end_time_unix_nano: nanoseconds(span.ended),
        attributes: told.chain(failed).collect(),
        links: link.into_iter().collect(),
        status,
        ..Default::default()
    }
}

/// All readings, as totals since the start.
pub(super) fn metrics(resource: &Resource, readings: &[Reading], since: SystemTime) -> ExportMetricsServiceRequest {
    let (since, now) = (nanoseconds(since), nanoseconds(SystemTime::now()));
    let metrics = readings.iter().filter_map(|reading| of_reading(reading, since, now)).collect();
    let metrics = ScopeMetrics { scope: scope(), metrics, ..Default::default() };
    let all =
        ResourceMetrics { resource: Some(resource.0.clone()), scope_metrics: vec![metrics], ..Default::default() };
    ExportMetricsServiceRequest { resource_metrics: vec![all] }
}

fn of_reading(reading: &Reading, since: u64, now: u64) -> Option<Metric> {
    let cumulative = AggregationTemporality::Cumulative.into();
    let attributes = |point: &Point| point.labels.iter().map(|(key, value)| text(key, value)).collect::<Vec<_>>();
    let number = |point: &Point, value: i64| NumberDataPoint {
        attributes: attributes(point),
        start_time_unix_nano: since,
        time_unix_nano: now,
        value: Some(number_data_point::Value::AsInt(value)),
        ..Default::default()
    };
    let points = &reading.points;
    let data = match points.first()?.value {
        Figure::Total(_) => Data::Sum(Sum {
            data_points: points.iter().filter_map(|p| Some(number(p, p.value.number()?))).collect(),
            aggregation_temporality: cumulative,
            is_monotonic: true,
        }),
        Figure::Level(_) => Data::Gauge(Gauge {
            data_points: points.iter().filter_map(|p| Some(number(p, p.value.number()?))).collect(),
        }),
        Figure::Times(_) => Data::ExponentialHistogram(ExponentialHistogram {
            data_points: points.iter().filter_map(|p| of_times(p, attributes(p), since, now)).collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Some(Metric {
        name: reading.name.into(),
        description: reading.help.into(),
        unit: match reading.unit {
            Unit::Things => "1",
            Unit::Seconds => "s",
            Unit::Bytes => "By",
        }
        .into(),
        data: Some(data),
        ..Default::default()
    })
}

fn of_times(point: &Point, attributes: Vec<KeyValue>, since: u64, now: u64) -> Option<ExponentialHistogramDataPoint> {
    let Figure::Times(times) = &point.value else { return None };
    let (offset, bucket_counts) = times.buckets();
    Some(ExponentialHistogramDataPoint {
        attributes,
        start_time_unix_nano: since,
        time_unix_nano: now,
        count: times.count(),
        sum: Some(times.sum_s()),
        scale: SCALE,
        positive: Some(Buckets { offset, bucket_counts }),
        ..Default::default()
    })
}

impl Figure {
    fn number(&self) -> Option<i64> {
        match self {
            Self::Total(total) => Some(i64::try_from(*total).unwrap_or(i64::MAX)),
            Self::Level(level) => Some(*level),
            Self::Times(_) => None,
        }
    }
}
