#!/usr/bin/env bash
# usage: setup_resources.sh [flags]
#
# Makes what NanoGrid needs in AWS as one CloudFormation stack for each queue, and writes
# application.yml here. A flag's value stays for later runs; --no-FLAG takes it back.
#
#   --region REGION         default: AWS_REGION, AWS_DEFAULT_REGION, else ap-northeast-2
#   --endpoint URL          default: AWS_ENDPOINT_URL (an emulator)
#   --existing-bucket NAME, --existing-output-bucket NAME   one that is there, as it is
#   --test-message          also upload hello-python, and send the message test-001
#   --dry-run               show what would change
#   --template              print the template
#   --down, --empty-bucket  remove the stack, after a question; its buckets too, and what is in them

[ -n "${BASH_VERSION:-}" ] || { echo "setup_resources.sh: run it with bash: bash $0" >&2; exit 2; }
set -euo pipefail  # bash 3.2 (macOS) reads this

# A parameter with a description is a flag, too: OutputBucket is --output-bucket.
template() {
  cat <<'END'
AWSTemplateFormatVersion: "2010-09-09"
Description: What NanoGrid needs in AWS, and on demand a fleet of machines that follows its queue
Parameters:
  Queue: {Type: String, Default: nanogrid-task-queue, Description: any other has a stack and names of its own}
  Dlq: {Type: String, Default: nanogrid-task-queue-dlq, Description: the dead-letter queue}
  Bucket: {Type: String, Description: "for code; default: nanogrid-code-bucket-ACCOUNTID"}
  BucketIsThere: {Type: String, Default: ""}
  Role: {Type: String, Default: NanoGridAgentRole, Description: of the agent}
  InstanceProfile: {Type: String, Default: NanoGridAgentProfile, Description: with the role in it}
  OutputBucket: {Type: String, Default: "", Description: for results}
  OutputBucketIsThere: {Type: String, Default: ""}
  OutputQueue: {Type: String, Default: "", Description: for results}
  FunctionPolicy: {Type: String, Default: "", Description: "the ARN of a managed policy: makes a role for functions that has it"}
  AlarmTopic: {Type: String, Default: "", Description: "the ARN of an SNS topic for alarms: dead letters, a message of 15 minutes"}
  Dashboard: {Type: String, Default: "", Description: "(no value) of CloudWatch: queue, DLQ, functions"}
  Least: {Type: String, Default: "", Description: "(no value) the agent may not extend leases"}
  Instances: {Type: String, AllowedPattern: "[0-9]+", Default: "0", Description: "at most so many machines follow the queue; again, to bring them nanogrid.py and application.yml as they are now"}
  InstanceType: {Type: String, Default: t3.small, Description: x86_64 or arm64; it and what follows go with --instances}
  Architecture: {Type: String, Default: x86_64}
  Subnets: {Type: String, Default: "", Description: "ID,ID; default: those of the default VPC"}
  Messages: {Type: Number, Default: 200, Description: so many may wait for each machine}
  Packages: {Type: String, Default: "", Description: "what functions need, such as nodejs"}
  Spot: {Type: String, Default: "", Description: (no value) spot instances}
  Version: {Type: String, Default: ""}
Conditions:
  MakeBucket: !Equals [!Ref BucketIsThere, ""]
  HasOutputBucket: !Not [!Equals [!Ref OutputBucket, ""]]
  MakeOutputBucket: !Not [!Or [!Equals [!Ref OutputBucket, ""], !Equals [!Ref OutputBucketIsThere, "yes"]]]
  MakeOutputQueue: !Not [!Equals [!Ref OutputQueue, ""]]
  MakeFunctionRole: !Not [!Equals [!Ref FunctionPolicy, ""]]
  MakeAlarms: !Not [!Equals [!Ref AlarmTopic, ""]]
  MakeDashboard: !Not [!Equals [!Ref Dashboard, ""]]
  IsLeast: !Not [!Equals [!Ref Least, ""]]
  MakeFleet: !Not [!Equals [!Ref Instances, "0"]]
  InDefaultVpc: !Equals [!Ref Subnets, ""]
  OnSpot: !Not [!Equals [!Ref Spot, ""]]
Resources:
  TaskQueue:
    {Type: AWS::SQS::Queue, Properties: {QueueName: !Ref Queue, VisibilityTimeout: 300,
      MessageRetentionPeriod: 1209600, ReceiveMessageWaitTimeSeconds: 20, MaximumMessageSize: 262144,
      RedrivePolicy: {deadLetterTargetArn: !GetAtt DeadLetterQueue.Arn, maxReceiveCount: 3}}}
  # It keeps messages as long as its source does: a message's age counts from its first queue.
  DeadLetterQueue:
    {Type: AWS::SQS::Queue, DeletionPolicy: Delete, UpdateReplacePolicy: Retain,
     Properties: {QueueName: !Ref Dlq, MessageRetentionPeriod: 1209600}}
  ResultQueue:
    {Type: AWS::SQS::Queue, DeletionPolicy: Delete, UpdateReplacePolicy: Retain, Condition: MakeOutputQueue,
     Properties: {QueueName: !Ref OutputQueue, MessageRetentionPeriod: 1209600}}
  # The buckets stay when the stack goes. They are made last: a first try that fails leaves none.
  CodeBucket:
    {Type: AWS::S3::Bucket, Condition: MakeBucket, DependsOn: [AgentPolicy, AgentProfile],
     DeletionPolicy: Retain, UpdateReplacePolicy: Retain, Properties: {
      BucketName: !Ref Bucket, OwnershipControls: {Rules: [{ObjectOwnership: BucketOwnerEnforced}]}, PublicAccessBlockConfiguration:
        {BlockPublicAcls: true, IgnorePublicAcls: true, BlockPublicPolicy: true, RestrictPublicBuckets: true},
      BucketEncryption: {ServerSideEncryptionConfiguration: [{ServerSideEncryptionByDefault: {SSEAlgorithm: AES256}}]}}}
  ResultBucket:
    {Type: AWS::S3::Bucket, Condition: MakeOutputBucket, DependsOn: [AgentPolicy, AgentProfile],
     DeletionPolicy: Retain, UpdateReplacePolicy: Retain, Properties: {
      BucketName: !Ref OutputBucket, OwnershipControls: {Rules: [{ObjectOwnership: BucketOwnerEnforced}]}, PublicAccessBlockConfiguration:
        {BlockPublicAcls: true, IgnorePublicAcls: true, BlockPublicPolicy: true, RestrictPublicBuckets: true},
      BucketEncryption: {ServerSideEncryptionConfiguration: [{ServerSideEncryptionByDefault: {SSEAlgorithm: AES256}}]}}}
  AgentRole:
    {Type: AWS::IAM::Role, Properties: {RoleName: !Ref Role, AssumeRolePolicyDocument: {Version: "2012-10-17", Statement: [
      {Effect: Allow, Principal: {Service: !Sub "ec2.${AWS::URLSuffix}"}, Action: sts:AssumeRole}]}}}
  AgentProfile:
    {Type: AWS::IAM::InstanceProfile, Properties: {InstanceProfileName: !Ref InstanceProfile, Roles: [!Ref AgentRole]}}
  # Tasks are sent by others: sqs:SendMessage is for results only. The conditions matter when a bucket
  # has gone: its name is then anybody's, and whoever serves the zip runs code.
  AgentPolicy:
    {Type: AWS::IAM::Policy, Properties: {
      PolicyName: NanoGridAgentPolicy, Roles: [!Ref AgentRole], PolicyDocument: {Version: "2012-10-17", Statement: [
        {Sid: SQSAccess, Effect: Allow, Resource: !GetAtt TaskQueue.Arn, Action: !If [IsLeast,
          ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"],
          ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes", "sqs:ChangeMessageVisibility"]]},
        {Sid: S3Access, Effect: Allow, Action: ["s3:GetObject", "s3:ListBucket"],
         Resource: [!Sub "arn:${AWS::Partition}:s3:::${Bucket}", !Sub "arn:${AWS::Partition}:s3:::${Bucket}/*"],
         Condition: {StringEquals: {"aws:ResourceAccount": !Ref AWS::AccountId}}},
        {Sid: CloudWatchAccess, Effect: Allow, Action: ["cloudwatch:PutMetricData"], Resource: "*",
         Condition: {StringEquals: {"cloudwatch:namespace": NanoGrid/FunctionRunner}}}]}}}
  OutputBucketPolicy:
    {Type: AWS::IAM::Policy, Condition: HasOutputBucket, Properties: {
      PolicyName: NanoGridOutputBucket, Roles: [!Ref AgentRole], PolicyDocument: {Version: "2012-10-17", Statement: [
        {Effect: Allow, Action: ["s3:PutObject"], Resource: !Sub "arn:${AWS::Partition}:s3:::${OutputBucket}/*",
         Condition: {StringEquals: {"aws:ResourceAccount": !Ref AWS::AccountId}}}]}}}
  OutputQueuePolicy:
    {Type: AWS::IAM::Policy, Condition: MakeOutputQueue, Properties: {
      PolicyName: NanoGridOutputQueue, Roles: [!Ref AgentRole], PolicyDocument: {Version: "2012-10-17", Statement: [
        {Effect: Allow, Action: ["sqs:SendMessage"], Resource: !Sub "arn:${AWS::Partition}:sqs:${AWS::Region}:${AWS::AccountId}:${OutputQueue}"}]}}}
  FunctionRole:
    {Type: AWS::IAM::Role, Condition: MakeFunctionRole, DependsOn: AgentProfile, Properties: {
      RoleName: !Sub "${Role}-functions", ManagedPolicyArns: [!Ref FunctionPolicy],
      AssumeRolePolicyDocument: {Version: "2012-10-17", Statement: [
        {Effect: Allow, Principal: {AWS: !GetAtt AgentRole.Arn}, Action: sts:AssumeRole}]}}}
  FunctionRolePolicy:
    {Type: AWS::IAM::Policy, Condition: MakeFunctionRole, Properties: {
      PolicyName: NanoGridFunctionRole, Roles: [!Ref AgentRole], PolicyDocument: {Version: "2012-10-17", Statement: [
        {Effect: Allow, Action: ["sts:AssumeRole"], Resource: !Sub "arn:${AWS::Partition}:iam::${AWS::AccountId}:role/${Role}-functions"}]}}}
  DeadLetters:
    {Type: AWS::CloudWatch::Alarm, Condition: MakeAlarms, Properties: {
      AlarmName: !Sub "NanoGrid-${Queue}-dead-letters", AlarmActions: [!Ref AlarmTopic],
      Namespace: AWS/SQS, MetricName: ApproximateNumberOfMessagesVisible, Statistic: Maximum,
      Dimensions: [{Name: QueueName, Value: !Ref Dlq}], Period: 60, EvaluationPeriods: 1,
      ComparisonOperator: GreaterThanThreshold, Threshold: 0, TreatMissingData: notBreaching}}
  # What fails is in the DLQ after three receives of 300 s: an older message waits for an agent.
  OldestMessage:
    {Type: AWS::CloudWatch::Alarm, Condition: MakeAlarms, Properties: {
      AlarmName: !Sub "NanoGrid-${Queue}-oldest-message", AlarmActions: [!Ref AlarmTopic],
      Namespace: AWS/SQS, MetricName: ApproximateAgeOfOldestMessage, Statistic: Maximum,
      Dimensions: [{Name: QueueName, Value: !Ref Queue}], Period: 60, EvaluationPeriods: 1,
      ComparisonOperator: GreaterThanThreshold, Threshold: 900, TreatMissingData: notBreaching}}
  Charts:
    Type: AWS::CloudWatch::Dashboard
    Condition: MakeDashboard
    Properties:
      DashboardName: !Sub "NanoGrid-${Queue}-${AWS::Region}"
      DashboardBody: !Sub |
        {"widgets": [{"type": "metric", "properties": {"title": "Queue", "region": "${AWS::Region}", "stat": "Maximum", "metrics": [
          ["AWS/SQS", "ApproximateNumberOfMessagesVisible", "QueueName", "${Queue}"], ["...", "${Dlq}"],
          [".", "ApproximateAgeOfOldestMessage", ".", "${Queue}", {"yAxis": "right"}]]}},
         {"type": "metric", "properties": {"title": "Peak memory", "region": "${AWS::Region}", "metrics": [
          [{"expression": "SEARCH('{NanoGrid/FunctionRunner,FunctionId,Runtime} MetricName=\"PeakMemoryBytes\"', 'Maximum', 60)"}]]}}]}
  FleetPolicy:
    {Type: AWS::IAM::Policy, Condition: MakeFleet, Properties: {
      PolicyName: NanoGridFleet, Roles: [!Ref AgentRole], PolicyDocument: {Version: "2012-10-17", Statement: [
        {Effect: Allow, Action: ["autoscaling:CompleteLifecycleAction"], Resource: !Sub
          "arn:${AWS::Partition}:autoscaling:${AWS::Region}:${AWS::AccountId}:autoScalingGroup:*:autoScalingGroupName/NanoGrid-${Queue}"}]}}}
  Machine:
    Type: AWS::EC2::LaunchTemplate
    Condition: MakeFleet
    Properties:
      LaunchTemplateData:
        ImageId: !Sub "resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-${Architecture}"
        InstanceType: !Ref InstanceType
        IamInstanceProfile: {Name: !Ref AgentProfile}
        MetadataOptions: {HttpTokens: required, HttpPutResponseHopLimit: 1}
        InstanceMarketOptions: !If [OnSpot, {MarketType: spot}, !Ref AWS::NoValue]
        # The image's own 8 GB have no room for maxDiskMb in each slot.
        BlockDeviceMappings: [{DeviceName: /dev/xvda, Ebs: {VolumeType: gp3, VolumeSize: 20, Encrypted: true}}]
        TagSpecifications: [{ResourceType: instance, Tags: [{Key: Name, Value: !Ref Queue}]}]
        UserData:
          Fn::Base64: !Sub |
            #!/bin/bash
            set -euo pipefail
            dnf -q -y install python3.12 ${Packages}
            mkdir -p /opt/nanogrid && cd /opt/nanogrid
            aws s3 cp --region ${AWS::Region} --only-show-errors s3://${Bucket}/nanogrid/${Version}.zip version.zip
            echo "${Version}  version.zip" | sha256sum --check
            python3.12 -m zipfile -e version.zip .
            bash fleet_machine.sh install ${AWS::Region} NanoGrid-${Queue} ${Spot}
  # A machine whose agent does not start is given up; one that is taken away may finish its runs.
  Fleet:
    {Type: AWS::AutoScaling::AutoScalingGroup, Condition: MakeFleet, DependsOn: [AgentPolicy, FleetPolicy], Properties: {
      AutoScalingGroupName: !Sub "NanoGrid-${Queue}", MinSize: "1", MaxSize: !Ref Instances,
      LaunchTemplate: {LaunchTemplateId: !Ref Machine, Version: !GetAtt Machine.LatestVersionNumber},
      AvailabilityZones: !If [InDefaultVpc, !GetAZs "", !Ref AWS::NoValue],
      VPCZoneIdentifier: !If [InDefaultVpc, !Ref AWS::NoValue, !Split [",", !Ref Subnets]],
      MetricsCollection: [{Granularity: 1Minute, Metrics: [GroupInServiceInstances]}],
      LifecycleHookSpecificationList: [{LifecycleHookName: ready, DefaultResult: ABANDON, HeartbeatTimeout: 600,
        LifecycleTransition: "autoscaling:EC2_INSTANCE_LAUNCHING"}]}}
  TakenAway:
    {Type: AWS::AutoScaling::LifecycleHook, Condition: MakeFleet, Properties: {
      AutoScalingGroupName: !Ref Fleet, LifecycleHookName: taken-away, DefaultResult: CONTINUE, HeartbeatTimeout: 600,
      LifecycleTransition: "autoscaling:EC2_INSTANCE_TERMINATING"}}
  Backlog:
    {Type: AWS::AutoScaling::ScalingPolicy, Condition: MakeFleet, Properties: {
      AutoScalingGroupName: !Ref Fleet, PolicyType: TargetTrackingScaling,
      TargetTrackingConfiguration: {TargetValue: !Ref Messages, CustomizedMetricSpecification: {Metrics: [
        {Id: backlog, Expression: waiting / machines},
        {Id: waiting, ReturnData: false, MetricStat: {Stat: Sum, Metric: {Namespace: AWS/SQS,
          MetricName: ApproximateNumberOfMessagesVisible, Dimensions: [{Name: QueueName, Value: !Ref Queue}]}}},
        {Id: machines, ReturnData: false, MetricStat: {Stat: Average, Metric: {Namespace: AWS/AutoScaling,
          MetricName: GroupInServiceInstances, Dimensions: [{Name: AutoScalingGroupName, Value: !Ref Fleet}]}}}]}}}}
END
}

# --------------------------------------------------------------------------- flags and failures

REGION="${AWS_REGION:-${AWS_DEFAULT_REGION:-ap-northeast-2}}" ENDPOINT="${AWS_ENDPOINT_URL:-}"
QUEUE=nanogrid-task-queue INSTANCES="" PARAMETERS=() ACTION=set_up DRY_RUN="" TEST_MESSAGE="" EMPTY_BUCKET=""
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# The CLI v2 would otherwise open a pager, ask for what it thinks is missing, or hide an error's code.
export AWS_PAGER="" AWS_CLI_AUTO_PROMPT=off AWS_CLI_ERROR_FORMAT=legacy

parse_flags() {
  while [ $# -gt 0 ]; do
    case "$1" in
      -h | --help) usage; exit ;;
      --template) template; exit ;;
      --down) ACTION=take_down ;;
      --empty-bucket) EMPTY_BUCKET=yes ;;
      --dry-run) DRY_RUN=yes ;;
      --test-message) TEST_MESSAGE=yes ;;
      --dashboard | --least | --spot) parameter "$1" yes ;;
      --no-*) parameter "--${1#--no-}" "" ;;
      *) set_value "$1" "${2:-}"; shift ;;
    esac
    shift
  done
}

set_value() {
  [ -n "$2" ] || wrong_usage "$1 needs a value, or is no flag"
  case "$1" in
    --region | --endpoint | --queue | --instances)
      printf -v "$(printf '%s' "${1#--}" | tr '[:lower:]' '[:upper:]')" '%s' "$2" ;;
    --bucket | --output-bucket) parameter "$1" "$2"; parameter "$1-is-there" "" ;;
    --existing-*) parameter "--${1#--existing-}" "$2"; parameter "--${1#--existing-}-is-there" yes ;;
    *) parameter "$1" "$2" ;;
  esac
}

# parameter --output-bucket NAME: the template's OutputBucket.
parameter() {
  local name
  name="$(printf '%s' "$1" | awk -F- '{ for (i = 3; i <= NF; i++) printf "%s", toupper(substr($i, 1, 1)) substr($i, 2) }')"
  template | grep "^  ${name%IsThere}: {.* Description: " >/dev/null || wrong_usage "there is no flag $1"
  PARAMETERS+=("$name=$2")
}

usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  template | sed -n 's/^  \([A-Z][A-Za-z]*\): {Type.*, Description: "\{0,1\}\([^}"]*\).*/\1 \2/p' |
    awk '{ flag = $1; gsub(/[A-Z]/, "-&", flag); $1 = ""; printf "  -%-20s %s\n", tolower(flag), $0 }'
}

wrong_usage() {
  printf 'setup_resources.sh: %s; --help lists the flags\n' "$1" >&2
  exit 2
}

# Ends the script: the step, the answer, CloudFormation's reasons, what to do.
failed() {
  local answer
  answer="$(sed '/^$/d; /^to fetch/d; s/^/  answer: /' "$TEMP/errors"; why 2>/dev/null)" || true
  printf 'setup_resources.sh: failed at: %s\n%s\n  to do:  %s\n' "$STEP" "$answer" "$(remedy "$answer")" >&2
  exit 1
}

# Why the stack's last operation failed. Of a name that is taken, which is found before anything is
# made, only describe-events tells, and older CLIs lack that.
why() {
  aws cloudformation describe-stack-events --stack-name "$STACK" --query \
    "StackEvents[].[LogicalResourceId, ResourceStatus, ResourceStatusReason]" |
    awk -F'\t' -v stack="$STACK" '$1 == stack && $2 ~ /^(CREATE|UPDATE|DELETE)_IN_PROGRESS$/ { over = 1 }
      !over && $2 ~ /_FAILED$/ { print "  reason: " $1 ": " $3 }'
  aws cloudformation describe-events --stack-name "$STACK" --filters FailedEvents=true --query \
    "OperationEvents[?ValidationStatusReason].[OperationId, LogicalResourceId, ValidationStatusReason]" |
    awk -F'\t' 'NR == 1 { last = $1 } $1 == last { print "  reason: " $2 ": " $3 }'
}

remedy() {
  case "$1" in
    *"lready exists"* | *AlreadyExists* | *AlreadyOwned*)
      echo "take another name by its flag, or a bucket as it is by --existing-bucket, --existing-output-bucket" ;;
    *redentials* | *"config profile"* | *InvalidClientTokenId* | *xpired* | *"SSO "* | *ccessDenied* | *uthorized*)
      echo "sign in as somebody who may do that (aws configure, aws sso login, AWS_PROFILE), or ask for the permission" ;;
    *) echo "mend what is named, then run this again; a change that failed is taken back by CloudFormation" ;;
  esac
}

# --------------------------------------------------------------------------- the stack

# --endpoint-url, since older CLIs do not know AWS_ENDPOINT_URL, and v1 passes over it for SQS.
aws() { command aws --region "$REGION" ${ENDPOINT:+--endpoint-url "$ENDPOINT"} --output text "$@"; }

# ask STEP COMMAND…: runs what must succeed; FOUND is what it printed.
ask() {
  STEP="$1"
  FOUND="$("${@:2}" 2>"$TEMP/errors")" || failed
}

find_out() { FOUND="$("$@" 2>/dev/null)" || FOUND="not known"; }

prepare() {
  type -P aws >/dev/null || wrong_usage "the AWS CLI (aws) is not on PATH: install it"
  [[ "$QUEUE" =~ ^[A-Za-z0-9_-]{1,80}$ ]] || wrong_usage "--queue is '$QUEUE'; it has letters, digits, _ and - (not FIFO)"
  TEMP="$(mktemp -d)"
  trap 'rm -rf "$TEMP"' EXIT
  template >"$TEMP/template.yml"
  STACK="NanoGrid-${QUEUE//_/--}"  # the name of a stack has no _
  ask credentials aws sts get-caller-identity --query Arn
  IFS=: read -r _ PARTITION _ _ ACCOUNT _ <<<"$FOUND"
  printf 'account %s, region %s, stack %s, as %s\n' "$ACCOUNT" "$REGION" "$STACK" "$FOUND"
  look_at_stack
}

# STATUS is the stack's, or empty; $TEMP/stack has its parameters, and what is in it.
look_at_stack() {
  local stack="Stacks[0].[[['Status', StackStatus]], Parameters[].[ParameterKey, ParameterValue]][]"
  STATUS="" STEP="stack $STACK"
  if aws cloudformation describe-stacks --stack-name "$STACK" --query "$stack" >"$TEMP/stack" 2>"$TEMP/errors"; then
    STATUS="$(value Status)"
  elif grep "does not exist" "$TEMP/errors" >/dev/null; then return; else failed; fi
  ask "$STEP" aws cloudformation describe-stack-resources --stack-name "$STACK" --query \
    "StackResources[].[LogicalResourceId, PhysicalResourceId]"
  printf '%s\n' "$FOUND" >>"$TEMP/stack"
}

# The value of a parameter; the URL of a queue, the name of anything else that is in the stack.
value() { awk -F'\t' -v name="$1" '$1 == name { print $2 }' "$TEMP/stack"; }

# deploy NAME=VALUE…: brings the stack to that; what is not named stays as it is.
deploy() {
  STEP="stack $STACK"
  aws cloudformation deploy --stack-name "$STACK" --template-file "$TEMP/template.yml" \
    --capabilities CAPABILITY_NAMED_IAM --no-fail-on-empty-changeset ${DRY_RUN:+--no-execute-changeset} \
    --tags Project=nanogrid "Queue=$QUEUE" --parameter-overrides "$@" "Queue=$QUEUE" 2>"$TEMP/errors" |
    tee "$TEMP/answer" | sed '/review changes/d; /^[A-Z]/!d' ||
    grep -q "No updates are to be performed" "$TEMP/errors" || failed
}

delete_stack() {
  ask "stack $STACK" aws cloudformation delete-stack --stack-name "$STACK"
  ask "stack $STACK" aws cloudformation wait stack-delete-complete --stack-name "$STACK"
}

set_up() {
  local suffix="-$QUEUE" defaults
  if [ "$QUEUE" = nanogrid-task-queue ]; then suffix=""; fi
  if [ "$STATUS" = ROLLBACK_COMPLETE ]; then delete_stack; STATUS=""; fi  # of a first try that failed
  if [[ " ${PARAMETERS[*]-}" =~ " InstanceType="([^ ]+) ]]; then
    ask "instance type" aws ec2 describe-instance-types --instance-types "${BASH_REMATCH[1]}" --query \
      "InstanceTypes[0].ProcessorInfo.SupportedArchitectures[?@=='x86_64' || @=='arm64'] | [0]"
    PARAMETERS+=("Architecture=$FOUND")
  fi
  if [ "${STATUS#REVIEW_IN_PROGRESS}" = "" ]; then
    # Those too that stay as they are: moto would take what was left out for changed next time.
    IFS=$'\n' read -r -d '' -a defaults < <(template | sed -n 's/^  \([A-Z][A-Za-z]*\): {Type: .* Default: "\{0,1\}\([^",}]*\).*/\1=\2/p') || true
    PARAMETERS=("${defaults[@]}" "Dlq=$QUEUE-dlq" "Role=NanoGridAgentRole$suffix" "InstanceProfile=NanoGridAgentProfile$suffix"
      "Bucket=nanogrid-code-bucket-$ACCOUNT$(printf '%s' "$suffix" | tr '[:upper:]_' '[:lower:]-')" ${PARAMETERS[@]+"${PARAMETERS[@]}"})
  fi
  deploy ${PARAMETERS[@]+"${PARAMETERS[@]}"} ${DRY_RUN:+${INSTANCES:+"Instances=$INSTANCES"}}
  if [ -n "$DRY_RUN" ]; then show_changes "$(sed -n 's/.* \(arn:\)/\1/p' "$TEMP/answer")" && return; fi
  look_at_stack
  write_config
  if [ -n "$INSTANCES" ]; then bring_up_fleet; fi
  if [ -n "$TEST_MESSAGE" ]; then send_test_message; fi
}

# show_changes CHANGE_SET: throws it away then, with the stack that was made for it alone.
show_changes() {
  if [[ "$1" == arn:* ]]; then
    ask "$STEP" aws cloudformation describe-change-set --change-set-name "$1" --query \
      "Changes[].ResourceChange.[Action, ResourceType, LogicalResourceId]"
    printf '%s\n' "$FOUND"
    ask "$STEP" aws cloudformation delete-change-set --change-set-name "$1"
  fi
  if [ "${STATUS#REVIEW_IN_PROGRESS}" = "" ]; then delete_stack; fi
  echo "Dry run: nothing was changed."
}

# The example with this stack's values, less the hints for whoever fills it in by hand. Its first line
# has a sum of the rest: what somebody has written or edited is left alone.
write_config() {
  local role mark="# Written by setup_resources.sh, and written anew while nobody edits it:" wanted
  role="$(value FunctionRole)"
  wanted="$(sed -e '/# ↑ /d; /^    # e\.g\. /d' -e "s|^    region: .*|    region: $REGION|" \
    -e "s|^    endpointUrl:.*|    endpointUrl: $ENDPOINT|" -e "s|^    queueUrl: .*|    queueUrl: $(value TaskQueue)|" \
    -e "s|^    codeBucket: .*|    codeBucket: $(value Bucket)|" -e "s|^    bucket:$|& $(value OutputBucket)|" \
    -e "s|^    queueUrl:$|& $(value ResultQueue)|" \
    -e "s|^    functionRole:$|& ${role:+arn:$PARTITION:iam::$ACCOUNT:role/$role}|" -e 's/: $/:/' "$HERE/application.yml.example")"
  if [ -e application.yml ] && [ "$(head -n 1 application.yml)" != "$mark $(sed 1d application.yml | cksum)" ]; then
    echo "application.yml is not as this script wrote it, and stays: it needs $(value TaskQueue) and $(value Bucket)"
  else
    printf '%s\n' "$mark $(printf '%s\n' "$wanted" | cksum)" "$wanted" >application.yml
    echo "application.yml has this stack's values"
  fi
}

send_test_message() {
  local object
  object="s3://$(value Bucket)/functions/hello-python/v1.zip"
  printf '%s\n' '#!/usr/bin/env python3' 'print("Hello from NanoGrid!")' 'print("Result: 42")' >"$TEMP/main.py"
  ask "zip of hello-python" python3 -m zipfile -c "$TEMP/hello-python.zip" "$TEMP/main.py"
  ask "$object" aws s3 cp --only-show-errors "$TEMP/hello-python.zip" "$object"
  ask "test message" aws sqs send-message --queue-url "$(value TaskQueue)" --message-body '{"requestId": "test-001",
    "functionId": "hello-python", "runtime": "python", "s3Bucket": "'"$(value Bucket)"'",
    "s3Key": "functions/hello-python/v1.zip", "timeoutMs": 5000, "memoryMb": 256}'
  echo "test-001 is sent: the agent (python3 nanogrid.py) will log Result: 42, status=ok, Successfully published"
}

# What a machine needs goes into the code bucket as one zip that is named by its sum: each machine gets
# what was put there, or nothing. The group's own machines get a new one by an instance refresh.
bring_up_fleet() {
  local version=""
  if [ "$INSTANCES" != 0 ]; then
    ask "the machines' zip" bash "$HERE/fleet_machine.sh" pack "$TEMP/version.zip" "$(value TaskQueue)"
    version="$FOUND"
    ask "upload" aws s3 cp --only-show-errors "$TEMP/version.zip" "s3://$(value Bucket)/nanogrid/$version.zip"
  fi
  deploy "Instances=$INSTANCES" "Version=$version"
  if [[ -n "$version" && "$(value Fleet)" == NanoGrid* ]]; then  # it was there before
    ask "instance refresh" aws autoscaling start-instance-refresh --auto-scaling-group-name "NanoGrid-$QUEUE" \
      --preferences MinHealthyPercentage=100,MaxHealthyPercentage=150,SkipMatching=true --query InstanceRefreshId
    echo "instance refresh $FOUND replaces the machines that are not as they should be, one after the other"
  fi
}

take_down() {
  local url bucket emptied="" answer=""
  [ -n "$STATUS" ] || { echo "not there: stack $STACK"; return; }
  if [ -n "$EMPTY_BUCKET" ]; then emptied="$(value CodeBucket) $(value ResultBucket)"; fi
  echo "This removes the stack $STACK, and all messages:"
  for url in $(value TaskQueue) $(value DeadLetterQueue) $(value ResultQueue); do
    find_out aws sqs get-queue-attributes --queue-url "$url" --attribute-names All --query \
      "Attributes.[ApproximateNumberOfMessages, ApproximateNumberOfMessagesNotVisible, ApproximateNumberOfMessagesDelayed]"
    echo "  queue ${url##*/}; messages that wait, are in work, are delayed: ${FOUND//$'\t'/, }"
  done
  find_out aws ec2 describe-iam-instance-profile-associations --query \
    "IamInstanceProfileAssociations[?ends_with(IamInstanceProfile.Arn, '/$(value InstanceProfile)')].InstanceId"
  echo "  instance profile $(value InstanceProfile); instances that use it: ${FOUND:-none}"
  for bucket in $(value Bucket) $(value OutputBucket); do
    if [[ " $emptied " == *" $bucket "* ]]; then echo "  bucket $bucket with all that it holds"
    else echo "  bucket $bucket stays; later, --existing-bucket or --existing-output-bucket uses it"; fi
  done
  if [ -n "$DRY_RUN" ]; then return; fi
  printf 'Type yes to go on: '
  read -r answer || true
  [ "$answer" = yes ] || { echo "the answer was not yes: nothing was removed" >&2; exit 1; }
  delete_stack
  for bucket in $emptied; do ask "bucket $bucket" aws s3 rb --force "s3://$bucket"; done
}

main() {
  parse_flags "$@"
  prepare
  "$ACTION"
}

main "$@"
