use super::*;

#[test]
fn shipped_plans_are_whole_and_survive_being_written() {
    for name in NAMES {
        let text = shipped(name).unwrap();
        let plan = Plan::parse(text).unwrap_or_else(|problems| panic!("{name}: {problems:?}"));
        let written = toml::to_string(&plan).unwrap();
        assert_eq!(Plan::parse(&written).unwrap_or_else(|p| panic!("{name}: {p:?}\n{written}")), plan, "{name}");
    }
}

#[test]
fn victims_are_read_as_they_are_written() {
    let rows =
        ["all", "any 2", "half", "all but 2", "an edge", "all issuers", "a seed", "an instance of orders", "node n3"];
    for row in rows {
        assert_eq!(row.parse::<Victims>().unwrap().to_string(), row);
    }
    for row in ["", "any 0", "some", "an instance", "all but none", "2 of orders"] {
        assert!(row.parse::<Victims>().unwrap_err().contains("write"), "{row}");
    }
}

fn problem(body: &str) -> String {
    let text = format!("about = \"x\"\n{body}");
    let problems = Plan::parse(&text).expect_err(body);
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_bad_plan_is_told_by_line() {
    let step = |fault: &str| format!("[[step]]\nname = \"s\"\nhold = \"5s\"\nfaults = [{fault}]");
    let rows = [
        ("nodse = 3", "line 2: unknown field `nodse`"),
        ("", "no [[step]]"),
        ("[mesh]\nnodes = 2", "line 3: nodes: 2"),
        (&step("{ kil = { victims = \"any 1\" } }"), "line 5: unknown variant `kil`"),
        (&step("{ kill = { victims = \"any 1\", bakc = \"1s\" } }"), "unexpected keys in table: bakc"),
        (&step("{ kill = { victims = \"any 9\" } }"), "line 2: kill: any 9: the mesh has only 5"),
        (&step("{ kill = { victims = \"all\" } }"), "leave at least one out"),
        (&step("{ kill = { victims = \"any 1\", back = \"6s\" } }"), "shorter than the step's hold"),
        (&step("{ kill = { victims = \"any 1\", back = \"soon\" } }"), "no duration"),
        (&step("{ kill = { victims = \"an instance of ordres\" } }"), "there are orders, stock"),
        (&step("{ loss = { victims = \"all\", share = 1.5 } }"), "above 0 and at most 1"),
        (&step("{ mtu = { victims = \"all\", bytes = 900 } }"), "QUIC needs 1200"),
        (&step("{ reload = { victims = \"all edges\", every = \"1s\" } }"), "write edges = 1"),
        (
            &step("{ clock = { victims = \"any 1\", ahead = \"1h\" } }, { disk-full = { victims = \"any 1\" } }"),
            "split it",
        ),
        ("[load]\ndoors = [\"edge-http3\"]", "line 3: doors: edge h3 needs an edge"),
    ];
    for (body, expected) in rows {
        let told = problem(body);
        assert!(told.contains(expected), "{body}\n-> {told}");
    }
}

#[test]
fn instances_are_dealt_out_from_the_last_node() {
    let plan = Plan::named("smoke").unwrap();
    let serving = plan.serving();
    assert_eq!(serving.len(), 5);
    assert_eq!(serving[0], ("n5".into(), "orders".into()));
    assert_eq!(serving[3], ("n2".into(), "stock".into()));
}
