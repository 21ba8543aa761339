{{/* For charts of applications that depend on this one: templates for their own pods. The first argument is the
     application's own context; the values are those under `entitlement-gateway` in its values.

       spec:
         terminationGracePeriodSeconds: {{ include "entitlement-gateway.sidecar.gracePeriod" . }}
         initContainers:
           - {{ include "entitlement-gateway.sidecar" . | nindent 6 | trim }}
         volumes: {{ include "entitlement-gateway.sidecar.volumes" . | nindent 4 }}
*/}}
{{- define "entitlement-gateway.scope" -}}
{{- if eq .Chart.Name "entitlement-gateway" -}}
{{ toJson (dict "Values" .Values "Release" .Release) }}
{{- else -}}
{{- $values := index .Values "entitlement-gateway" | required "the values have no `entitlement-gateway`: add the chart to your dependencies, without an alias" -}}
{{- if ne $values.mode "sidecar" -}}
{{ fail "entitlement-gateway.mode is not sidecar: this template is for gateways in the application's own pods" }}
{{- end -}}
{{ toJson (dict "Values" $values "Release" .Release) }}
{{- end -}}
{{- end -}}

{{/* The gateway as a container that runs beside the others: it is there before they start and after they end. */}}
{{- define "entitlement-gateway.sidecar" -}}
{{- $scope := include "entitlement-gateway.scope" . | fromJson -}}
{{- $port := int64 $scope.Values.gateway.port -}}
{{- $asks := printf "import socket; socket.create_connection(('127.0.0.1', %d), 1)" $port -}}
{{ include "entitlement-gateway.gateway.container" $scope }}
{{- if $scope.Values.metrics.enabled }}
ports:
  - {name: ent-metrics, containerPort: {{ int64 $scope.Values.metrics.gatewayPort }}}
{{- end }}
restartPolicy: Always
# It is on loopback, where the kubelet cannot ask. Nothing is said of readiness: the application is, or is not, by itself.
startupProbe:
  exec: {command: [python, -I, -S, -c, {{ $asks | quote }}]}
  periodSeconds: 1
  timeoutSeconds: 2
  failureThreshold: 120
livenessProbe:
  exec: {command: [python, -I, -S, -c, {{ $asks | quote }}]}
  periodSeconds: 15
  timeoutSeconds: 5
  failureThreshold: 4
{{- end -}}

{{- define "entitlement-gateway.sidecar.volumes" -}}
{{ include "entitlement-gateway.gateway.volumes" (include "entitlement-gateway.scope" . | fromJson) }}
{{- end -}}

{{/* Labels for the pod: the trial's Valkey lets pods in by them. */}}
{{- define "entitlement-gateway.sidecar.labels" -}}
entitlement-gateway/sidecar-of: {{ .Release.Name }}
{{- end -}}

{{/* Where the application finds it. */}}
{{- define "entitlement-gateway.sidecar.env" -}}
{{- $scope := include "entitlement-gateway.scope" . | fromJson -}}
- name: ENTITLEMENT_ADDRESS
  value: "127.0.0.1:{{ int64 $scope.Values.gateway.port }}"
{{- end -}}

{{/* Seconds, at least, for a pod with it: it is ended after the application's own containers. */}}
{{- define "entitlement-gateway.sidecar.gracePeriod" -}}
{{ include "entitlement-gateway.gracePeriod" (include "entitlement-gateway.scope" . | fromJson) }}
{{- end -}}
